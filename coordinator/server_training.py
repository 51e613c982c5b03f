"""Train the back of the model: one shared server adapter, fed by every device.

Each device's gradients of the open step are summed apart, so that a lost device's share can
be dropped whole. Losses are sums over target tokens; closing a step adds up the shares of
the devices that count, divides by their target tokens, and takes one optimizer step.

Shape suffixes: N packed tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from shared.adapters import AdapterState, HeldAdapters
from shared.errors import NumericsError, ProtocolError
from shared.modeling.compute import compute_device, explained_out_of_memory
from shared.modeling.lora import dropout_seed
from shared.modeling.optimizer import AdapterOptimizer, OptimizerState
from shared.modeling.packing import Packing
from shared.modeling.skeleton import Tensors
from shared.modeling.splitting import Placement, build_back
from shared.modeling.wire import DTYPES, from_frame, to_frame
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

_explained = explained_out_of_memory("the server")


@dataclass(frozen=True, slots=True, order=True)
class MicroBatchKey:
    """Names one micro-batch of one step of one device."""

    step: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchInput:
    """What a device sent of one micro-batch, unchecked.

    ``hidden`` (N, D) in the wire dtype, N = sum(lengths); ``labels`` (N,) int32 where the head
    is on the server, -100 where a position predicts nothing, else None.
    """

    split_layer: int
    lengths: Sequence[int]
    hidden: TensorFrame
    labels: TensorFrame | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HiddenResult:
    """The back's output (N, D) in the wire dtype, for the head on the device."""

    hidden: TensorFrame


@dataclass(frozen=True, slots=True, eq=False)
class GradientResult:
    """The gradient (N, D) of the summed loss with respect to what the device sent."""

    gradient: TensorFrame
    loss_sum: float


@dataclass(frozen=True, slots=True, eq=False)
class LossResult:
    """The summed loss of an evaluation micro-batch."""

    loss_sum: float


Gradients: TypeAlias = dict[nn.Parameter, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """A micro-batch that went through the back: its graph runs from one tensor to the other."""

    received_ND: torch.Tensor
    hidden_ND: torch.Tensor


class ServerTrainer:
    """The server-side model under training. Not thread-safe: it belongs to the owner's thread.

    Every check comes before any change: after an error no share and no adapter has changed.
    Whatever it is asked may also end in a `PlanError`: the memory is full.
    """

    @_explained
    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Tensors,
        *,
        first_block: int,
        training: TrainingTerms,
        lora: LoraTerms,
        optimizer: OptimizerTerms,
        device: str | None = None,
    ) -> None:
        """Hold blocks ``first_block`` and up, and with `labels: server` the head.

        ``first_block`` is the smallest split layer of the plan (the block count where all
        devices hold all blocks; then `labels` must be ``server``). ``device`` is a torch
        device; None: CUDA where available, else the CPU.

        Raises:
            ConfigError: there is no such device here.
            ModelError: unsupported family, or a tensor is missing or misshapen.
            PlanError: there is nothing to hold, or max_length exceeds the positions.
        """
        placement = Placement(
            dtype=DTYPES[training.dtype],
            device=compute_device(device),
            lora_dropout=lora.lora_dropout,
        )
        head = training.labels == "server"
        self._back = build_back(
            config, tensors, first_block=first_block, head=head, placement=placement
        )
        self._back.architecture.check_max_length(training.max_length)
        self._training = training
        self._optimizer = AdapterOptimizer(optimizer, total_steps=training.total_steps)
        self._open: dict[tuple[DeviceId, MicroBatchKey], _Forward] = {}
        self._sums: dict[DeviceId, Gradients] = {}

    @property
    def first_block(self) -> int:
        """The first block held."""
        return self._back.blocks.start

    @property
    def open_micro_batches(self) -> int:
        """How many micro-batches wait for the head's gradient, holding their activations."""
        return len(self._open)

    @_explained
    def train(
        self, device_id: DeviceId, key: MicroBatchKey, sent: MicroBatchInput
    ) -> HiddenResult | GradientResult:
        """Run one training micro-batch.

        With `labels: device` the result is a `HiddenResult`, and the micro-batch stays open
        until `train_gradient`. With `labels: server` its gradients are added to the device's
        share, and the result is a `GradientResult`.

        Raises:
            NumericsError: a shape, dtype, length or label that does not belong, or NaN or
                infinity, received or computed.
            ProtocolError: the micro-batch is open already, labels are missing or unwanted, or
                the split layer's blocks are not held.
        """
        if (device_id, key) in self._open:
            raise ProtocolError(f"{_name(device_id, key)} is open already")
        name = _name(device_id, key)
        self._check(sent, name=name)
        labels_N = self._labels(sent, name=name)
        self._back.adapters.dropout.begin(
            dropout_seed(
                self._training.seed,
                device_id=device_id,
                step=key.step,
                micro_batch=key.micro_batch,
                side="server",
            )
        )
        forward = self._run(sent, name=name, train=True)
        if labels_N is None:
            frame = self._send(forward.hidden_ND, what=f"hidden states of {name}")
            self._open[device_id, key] = forward
            return HiddenResult(frame)
        loss = self._back.loss_sum(forward.hidden_ND, labels_N)
        loss_sum = _finite(float(loss.detach()), name=name)
        return GradientResult(self._backward(device_id, forward, loss, None, name=name), loss_sum)

    @_explained
    def train_gradient(
        self, device_id: DeviceId, key: MicroBatchKey, gradient: TensorFrame
    ) -> TensorFrame:
        """Take the head's gradient (N, D) of an open micro-batch; return that of what came in.

        The adapter's gradients are added to the device's share, and the micro-batch is closed.

        Raises:
            NumericsError: wrong shape or dtype, NaN or infinity; nothing was added. The
                micro-batch stays open where it was what came in.
            ProtocolError: no such micro-batch is open.
        """
        name = _name(device_id, key)
        forward = self._open.get((device_id, key))
        if forward is None:
            raise ProtocolError(f"{name} is not open: its activations never came or were dropped")
        outer_ND = self._receive(
            gradient, tuple(forward.hidden_ND.shape), what=f"head gradient of {name}"
        )
        del self._open[device_id, key]
        return self._backward(device_id, forward, forward.hidden_ND, outer_ND, name=name)

    @_explained
    def evaluate(self, device_id: DeviceId, sent: MicroBatchInput) -> HiddenResult | LossResult:
        """Run one evaluation micro-batch: no dropout, no gradient, nothing kept.

        Raises:
            NumericsError: as in `train`.
            ProtocolError: labels are missing or unwanted, or the blocks are not held.
        """
        name = f"evaluation of {device_id}"
        self._check(sent, name=name)
        labels_N = self._labels(sent, name=name)
        self._back.adapters.dropout.begin(None)
        with torch.no_grad():
            hidden_ND = self._run(sent, name=name, train=False).hidden_ND
            if labels_N is None:
                return HiddenResult(self._send(hidden_ND, what=f"hidden states, {name}"))
            return LossResult(_finite(float(self._back.loss_sum(hidden_ND, labels_N)), name=name))

    @_explained
    def close_step(self, step: int, *, devices: Sequence[DeviceId], target_tokens: int) -> float:
        """Take optimizer step ``step`` on the shares of ``devices``; drop everybody else's.

        Shares are added in the order of the devices' names, so that the order of arrival
        changes nothing. Returns the gradient norm before clipping (0.0 where no adapter of the
        server took part).

        Raises:
            ProtocolError: one of ``devices`` still has an open micro-batch.
            NumericsError: no target tokens, or a gradient that is not finite; the adapters are
                unchanged, the step's gradients are gone.
        """
        unfinished = sorted({device for device, _ in self._open if device in devices})
        if unfinished:
            raise ProtocolError(f"step {step} cannot close: {', '.join(unfinished)} still at work")
        shares = [self._sums[device] for device in sorted(devices) if device in self._sums]
        self._forget_step()
        for share in shares:
            for parameter, gradient in share.items():
                known = parameter.grad
                parameter.grad = gradient if known is None else known.add_(gradient)
        return self._optimizer.step(step, denominator=target_tokens)

    def drop(self, device_id: DeviceId) -> None:
        """Forget all that a device contributed to the open step, and its open micro-batches."""
        self._sums.pop(device_id, None)
        for open_key in [open_key for open_key in self._open if open_key[0] == device_id]:
            del self._open[open_key]

    @_explained
    def set_adapters(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """Replace the named modules' adapters and reset their optimizer moments.

        Modules not named stay as they are. With ``fold`` each frozen pair is added to the base
        weight instead of held. What is left of an open step is forgotten.

        Raises:
            ProtocolError: a name is no linear module held here.
            NumericsError: a factor has the wrong shape or is not finite; nothing changed.
        """
        self._back.adapters.replace(adapters, fold=fold)
        self._forget_step()
        self._optimizer.follow(self._back.adapters.parameters())

    def adapters(self) -> AdapterState:
        """Return copies of the trainable pairs, float32, by full module path."""
        return self._back.adapters.read()

    def optimizer_state(self) -> OptimizerState:
        """Return copies of the optimizer's moments and counts, as arrays for safetensors."""
        return self._optimizer.state()

    def restore_optimizer(self, state: OptimizerState) -> None:
        """Continue from a saved `optimizer_state`; the same adapters were set before.

        Raises:
            StorageError: the state is of other modules or ranks.
        """
        self._optimizer.restore(state)

    def _check(self, sent: MicroBatchInput, *, name: str) -> None:
        blocks, lengths = self._back.blocks, sent.lengths
        if not blocks.start <= sent.split_layer <= blocks.stop:
            raise ProtocolError(
                f"{name}: split layer {sent.split_layer}, but the server holds blocks "
                f"{blocks.start} to {blocks.stop - 1}"
            )
        if not lengths or min(lengths) < 1 or max(lengths) > self._training.max_length:
            raise NumericsError(
                f"{name}: sequences must have 1 to {self._training.max_length} tokens, "
                f"got {min(lengths, default=0)} to {max(lengths, default=0)}"
            )

    def _run(self, sent: MicroBatchInput, *, name: str, train: bool) -> _Forward:
        """Run what came in through the back."""
        shape = (sum(sent.lengths), self._back.architecture.hidden_size)
        received_ND = self._receive(sent.hidden, shape, what=f"activations of {name}")
        received_ND = received_ND.to(self._back.dtype).requires_grad_(train)
        packing = Packing.of(sent.lengths, device=self._back.device)
        return _Forward(received_ND, self._back(received_ND, packing, split_layer=sent.split_layer))

    def _backward(
        self,
        device_id: DeviceId,
        forward: _Forward,
        output: torch.Tensor,
        outer: torch.Tensor | None,
        *,
        name: str,
    ) -> TensorFrame:
        """Add the adapter's gradients to the device's share; return that of what came in."""
        factors = self._back.adapters.parameters().values()
        parameters = [parameter for pair in factors for parameter in pair]
        received, *gradients = torch.autograd.grad(
            output, [forward.received_ND, *parameters], outer, allow_unused=True
        )
        frame = self._send(received, what=f"activation gradient of {name}")
        share = self._sums.setdefault(device_id, {})
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # None: the parameter is in a block below this device's split layer.
            if gradient is not None:
                share[parameter] = share[parameter] + gradient if parameter in share else gradient
        return frame

    def _labels(self, sent: MicroBatchInput, *, name: str) -> torch.Tensor | None:
        if (sent.labels is None) != (self._training.labels == "device"):
            raise ProtocolError(
                f"{name}: labels {'missing' if sent.labels is None else 'sent'}, but this run "
                f"has labels: {self._training.labels}"
            )
        if sent.labels is None:
            return None
        shape = (sum(sent.lengths),)
        device = self._back.device
        what = f"labels of {name}"
        labels_N = from_frame(sent.labels, what=what, dtype="int32", shape=shape, device=device)
        vocab_size = self._back.architecture.vocab_size
        if bool((labels_N >= vocab_size).any()):
            raise NumericsError(f"{what}: token id {int(labels_N.max())} of {vocab_size} words")
        return labels_N.long()

    def _receive(self, frame: TensorFrame, shape: tuple[int, ...], *, what: str) -> torch.Tensor:
        dtype, device = self._training.wire_dtype, self._back.device
        return from_frame(frame, what=what, dtype=dtype, shape=shape, device=device)

    def _send(self, tensor_ND: torch.Tensor, *, what: str) -> TensorFrame:
        return to_frame(tensor_ND, dtype=self._training.wire_dtype, what=what)

    def _forget_step(self) -> None:
        self._open.clear()
        self._sums.clear()
        self._optimizer.discard()


def _name(device_id: DeviceId, key: MicroBatchKey) -> str:
    return f"{device_id}, step {key.step}, micro-batch {key.micro_batch}"


def _finite(loss_sum: float, *, name: str) -> float:
    if not math.isfinite(loss_sum):
        raise NumericsError(
            f"the loss of {name} is {loss_sum}: training diverged; lower optimizer.learning_rate"
        )
    return loss_sum
