"""Train the back of the model: one shared server adapter, fed by every device.

Each device's gradients of the open step are summed apart, so that a lost device's share can
be dropped whole. Losses are sums over target tokens; closing a step adds up the shares of
the devices that count, divides by their target tokens, and takes one optimizer step.

Shape suffixes: N packed tokens, M of them that the head reads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from coordinator.back_pass import (
    BackPass,
    GradientResult,
    HiddenResult,
    LossResult,
    MicroBatchInput,
    MicroBatchKey,
    name_of,
)
from coordinator.server_probe import ServerProbe
from shared.adapters import AdapterState, HeldAdapters
from shared.classifier_weights import ClassifierTensors
from shared.dropout_seed import dropout_seed
from shared.errors import ProtocolError
from shared.modeling.compute import compute_device, explained_out_of_memory
from shared.modeling.optimizer import AdapterOptimizer, OptimizerState
from shared.modeling.skeleton import Tensors
from shared.modeling.splitting import Placement, build_back
from shared.modeling.wire import DTYPES
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

_explained = explained_out_of_memory("the server")


Gradients: TypeAlias = dict[nn.Parameter, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """A micro-batch that went through the back: its graph runs from one tensor to the other."""

    received_ND: torch.Tensor
    hidden_MD: torch.Tensor


class ServerTrainer:
    """The server-side model under training. Not thread-safe: it belongs to the owner's thread.

    ``probe`` measures how important its weights are, beside the training.

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
            freeze_a=lora.freeze_a,
        )
        head = training.labels == "server"
        self._back = build_back(
            config,
            tensors,
            first_block=first_block,
            head=head,
            placement=placement,
            training=training,
        )
        architecture = self._back.architecture
        architecture.check_max_length(training.max_length)
        self._through = BackPass(self._back, training)
        self.probe = ServerProbe(
            self._through, architecture.adaptable_modules(lora, blocks=self._back.blocks)
        )
        self._seed = training.seed
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
        return len(self._open) + self.probe.open_micro_batches

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
        name = name_of(device_id, key)
        if (device_id, key) in self._open:
            raise ProtocolError(f"{name} is open already")
        arrived = self._through.read(sent, name=name)
        self._back.adapters.dropout.begin(
            dropout_seed(
                self._seed,
                device_id=device_id,
                step=key.step,
                micro_batch=key.micro_batch,
                side="server",
            )
        )
        received_ND = arrived.hidden_ND.requires_grad_()
        forward = _Forward(received_ND, self._through.run(arrived))
        if arrived.labels_M is None:
            frame = self._through.frame(forward.hidden_MD, what=f"hidden states of {name}")
            self._open[device_id, key] = forward
            return HiddenResult(frame)
        judged, loss_sum = self._through.judge(forward.hidden_MD, arrived.labels_M, name=name)
        gradient = self._backward(device_id, forward, judged.loss, None, name=name)
        return GradientResult(gradient, loss_sum)

    @_explained
    def train_gradient(
        self, device_id: DeviceId, key: MicroBatchKey, gradient: TensorFrame
    ) -> TensorFrame:
        """Take the head's gradient (M, D) of an open micro-batch; return that of what came in.

        The adapter's gradients are added to the device's share, and the micro-batch is closed.

        Raises:
            NumericsError: wrong shape or dtype, NaN or infinity; nothing was added. The
                micro-batch stays open where it was what came in.
            ProtocolError: no such micro-batch is open.
        """
        name = name_of(device_id, key)
        forward = self._open.get((device_id, key))
        if forward is None:
            raise ProtocolError(f"{name} is not open: its activations never came or were dropped")
        outer_ND = self._through.head_gradient(gradient, forward.hidden_MD, name=name)
        del self._open[device_id, key]
        return self._backward(device_id, forward, forward.hidden_MD, outer_ND, name=name)

    @_explained
    def evaluate(self, device_id: DeviceId, sent: MicroBatchInput) -> HiddenResult | LossResult:
        """Run one evaluation micro-batch: no dropout, no gradient, nothing kept.

        Raises:
            NumericsError: as in `train`.
            ProtocolError: labels are missing or unwanted, or the blocks are not held.
        """
        name = f"evaluation of {device_id}"
        arrived = self._through.read(sent, name=name)
        self._back.adapters.dropout.begin(None)
        with torch.no_grad():
            hidden_MD = self._through.run(arrived)
            if arrived.labels_M is None:
                return HiddenResult(self._through.frame(hidden_MD, what=f"hidden states, {name}"))
            judged, loss_sum = self._through.judge(hidden_MD, arrived.labels_M, name=name)
            return LossResult(loss_sum, judged.counts)

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
        self.probe.drop(device_id)

    @_explained
    def set_adapters(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """Replace the named modules' adapters and reset their optimizer moments.

        Modules not named stay as they are. With ``fold`` each frozen pair is added to the base
        weight instead of held. What is left of an open step or of a probe is forgotten.

        Raises:
            ProtocolError: a name is no linear module held here.
            NumericsError: a factor has the wrong shape or is not finite; nothing changed.
        """
        self._back.adapters.replace(adapters, fold=fold)
        self._forget_step()
        self.probe.take()
        self._optimizer.follow(self._back.trained())

    @_explained
    def set_classifier(self, weights: ClassifierTensors) -> None:
        """Replace the classifier's weights and reset their optimizer moments.

        Does nothing where there is none here and ``weights`` is empty. What is left of an open
        step is forgotten.

        Raises:
            ProtocolError: there is no classifier here.
            NumericsError: they are not of its names and shapes, or not finite; nothing changed.
        """
        if self._back.head is None:
            if weights:
                raise ProtocolError("weights of a classifier, but the head is on the devices")
            return
        self._back.head.replace(weights)
        self._forget_step()
        self._optimizer.follow(self._back.trained())

    def classifier(self) -> ClassifierTensors:
        """Return copies of the classifier's weights, float32; none where there is none here."""
        return {} if self._back.head is None else self._back.head.tensors()

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

    def _backward(
        self,
        device_id: DeviceId,
        forward: _Forward,
        output: torch.Tensor,
        outer: torch.Tensor | None,
        *,
        name: str,
    ) -> TensorFrame:
        """Add the gradients of what is trained to the device's share; return that of what came."""
        trained = self._back.trained().values()
        parameters = [one for several in trained for one in several if one.requires_grad]
        received, *gradients = torch.autograd.grad(
            output, [forward.received_ND, *parameters], outer, allow_unused=True
        )
        frame = self._through.frame(received, what=f"activation gradient of {name}")
        share = self._sums.setdefault(device_id, {})
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # None: the parameter is in a block below this device's split layer.
            if gradient is not None:
                share[parameter] = share[parameter] + gradient if parameter in share else gradient
        return frame

    def _forget_step(self) -> None:
        self._open.clear()
        self.probe.drop_open()
        self._sums.clear()
        self._optimizer.discard()
