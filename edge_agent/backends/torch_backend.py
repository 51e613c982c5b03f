"""The torch backend: the front of the model on CUDA where there is one, else on the CPU.

Shape suffixes: N packed tokens, M of them that the head reads, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_agent.backends.base import FrontBase, MicroBatch, TokenBatch, check_batch
from edge_agent.backends.open_work import OpenWork, finite_loss
from shared.adapters import AdapterState, HeldAdapters
from shared.class_counts import ClassCounts
from shared.classifier_weights import ClassifierTensors
from shared.dropout_seed import dropout_seed
from shared.errors import ModelError, ProtocolError
from shared.memory_use import AcceleratorMemory
from shared.modeling.accelerator import TorchMemory, wait_for
from shared.modeling.compute import compute_device, explained_out_of_memory
from shared.modeling.importance import WatchedForward, linear_module, watching
from shared.modeling.optimizer import AdapterOptimizer
from shared.modeling.packing import Packing
from shared.modeling.splitting import FrontModel, Placement, build_front
from shared.modeling.wire import DTYPES, from_frame, to_frame
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

_explained = explained_out_of_memory("this device")


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """What backward and head still need of one micro-batch: the graph hangs on ``hidden_ND``.

    ``labels_M`` are those that the head reads; ``watched`` where it is of a probe.
    """

    hidden_ND: torch.Tensor
    labels_M: torch.Tensor
    packing: Packing
    watched: WatchedForward | None = None


class TorchBackend:
    """A `Backend` in torch. Not thread-safe: it belongs to the agent's own thread.

    Whatever it is asked may also end in a `PlanError`: the memory is full.
    """

    name = "torch"
    needs_graphs = False

    def __init__(self, device: str | None = None, *, threads: int | None = None) -> None:
        """Compute on ``device`` (a torch device); None: CUDA where available, else the CPU.

        ``threads``: CPU threads of this whole process; None: as many as torch takes.

        Raises:
            ConfigError: there is no such device here.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = compute_device(device)
        self._memory = TorchMemory(self._device)
        self._front: FrontModel | None = None
        self._optimizer: AdapterOptimizer | None = None
        self._training = TrainingTerms()
        self._device_id = DeviceId("")
        self._open: OpenWork[_Kept] = OpenWork()

    @property
    def accelerator(self) -> str | None:
        """The GPU's name; None on the CPU."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else None

    @property
    def computes_with(self) -> str:
        """Torch's version and device."""
        return f"torch {torch.__version__}, {self._device}"

    @_explained
    def load(
        self,
        base: FrontBase,
        *,
        device_id: DeviceId,
        training: TrainingTerms,
        lora: LoraTerms,
        optimizer: OptimizerTerms,
    ) -> None:
        """Build the part from pristine base weights, without adapters; may be called again.

        Raises:
            ModelError: a file lacks a tensor, or the architecture is not supported.
            PlanError: the split layer does not exist, or max_length exceeds the positions.
        """
        # The old part first, so that a device never needs room for two.
        self._front = None
        self.discard()
        front = build_front(
            _parse(base.config_json),
            base.files.values(),
            split_layer=base.split_layer,
            head=training.labels == "device",
            placement=Placement(
                dtype=DTYPES[training.dtype],
                device=self._device,
                lora_dropout=lora.lora_dropout,
                freeze_a=lora.freeze_a,
            ),
            training=training,
        )
        front.architecture.check_max_length(training.max_length)
        self._front = front
        self._training = training
        self._device_id = device_id
        self._optimizer = AdapterOptimizer(optimizer, total_steps=training.total_steps)

    @_explained
    def set_adapters(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """Replace the named modules' adapters and reset their optimizer moments.

        What is kept of an open step is forgotten: it belongs to the old adapters.

        Raises:
            ProtocolError: a name is no linear module of this part.
            NumericsError: a factor has the wrong shape or is not finite; nothing changed.
        """
        front = self._loaded()
        front.adapters.replace(adapters, fold=fold)
        self.discard()
        self._stepper().follow(front.trained())

    @_explained
    def set_classifier(self, weights: ClassifierTensors) -> None:
        """Replace the classifier's weights and reset their optimizer moments.

        Raises:
            ProtocolError: there is no classifier here.
            NumericsError: they are not of its names and shapes, or not finite; nothing changed.
        """
        front = self._loaded()
        if front.head is None:
            raise ProtocolError("weights of a classifier came, but the head is on the server")
        front.head.replace(weights)
        self.discard()
        self._stepper().follow(front.trained())

    def classifier(self) -> ClassifierTensors:
        """Return copies of the classifier's weights, float32; none where there is none here."""
        head = self._loaded().head
        return {} if head is None else head.tensors()

    def take_counts(self) -> ClassCounts:
        """Return how the classifier chose in evaluations here since the last time."""
        return self._open.take_counts()

    @_explained
    def forward(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> TensorFrame:
        """Return the activations (N, D) in the wire dtype.

        With ``train``, what backward needs is kept; with `labels: device`, what head needs.

        Raises:
            NumericsError: the activations hold NaN or infinity.
            ModelError: a token id or a length that this model does not have.
        """
        kept = self._run(key, batch, train=train)
        what = f"activations of step {key.step}, micro-batch {key.index}"
        frame = to_frame(kept.hidden_ND, dtype=self._training.wire_dtype, what=what)
        if train or self._training.labels == "device":
            self._open.keep(key, kept, train=train)
        return frame

    @_explained
    def backward(self, key: MicroBatch, gradient: TensorFrame) -> None:
        """Accumulate adapter gradients from the gradient (N, D) of the activations.

        Raises:
            NumericsError: wrong shape or dtype, NaN or infinity; nothing was accumulated.
            ProtocolError: no such micro-batch is open.
        """
        kept = self._open.find(key, train=True)
        shape = tuple(kept.hidden_ND.shape)
        gradient_ND = self._receive(gradient, shape, what=f"gradient of {key}")
        self._open.close(key, train=True)
        self._go_back(kept, kept.hidden_ND, gradient_ND.to(kept.hidden_ND.dtype), what=str(key))

    @_explained
    def head(
        self, key: MicroBatch, hidden: TensorFrame, *, train: bool
    ) -> tuple[float, TensorFrame | None]:
        """Return the summed loss and, with ``train``, its gradient (M, D) in the wire dtype.

        ``forward`` of the same key came before and kept the labels.

        Raises:
            NumericsError: wrong shape or dtype, NaN or infinity, received or in the loss.
            ProtocolError: no such micro-batch is open.
        """
        front, kept = self._loaded(), self._open.find(key, train=train)
        shape = (len(kept.labels_M), kept.hidden_ND.shape[1])
        received_MD = self._receive(hidden, shape, what=f"hidden states of {key}")
        hidden_MD = received_MD.to(front.dtype).requires_grad_(train)
        loss, loss_sum = self._judge(key, hidden_MD, kept, train=train)
        if not train:
            self._open.close(key, train=False)
            return loss_sum, None
        learning = [] if front.head is None or kept.watched else [*front.head.parameters().values()]
        gradient_MD, *gradients = torch.autograd.grad(loss, [hidden_MD, *learning])
        what = f"head gradient of {key}"
        frame = to_frame(gradient_MD, dtype=self._training.wire_dtype, what=what)
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss_sum, frame

    @_explained
    def whole(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> float:
        """Return the summed loss where the device holds all blocks and the head.

        With ``train``, gradients are accumulated.

        Raises:
            NumericsError: the loss is not finite; nothing was accumulated.
            ModelError: a token id or a length that this model does not have.
        """
        kept = self._run(key, batch, train=train)
        with torch.set_grad_enabled(train):
            hidden_MD = self._loaded().read(kept.hidden_ND, kept.packing)
        loss, loss_sum = self._judge(key, hidden_MD, kept, train=train)
        if train:
            self._go_back(kept, loss, None, what=str(key))
        return loss_sum

    @_explained
    def step(self, step: int, *, target_tokens: int) -> float:
        """Divide the accumulated gradients by ``target_tokens``, clip, take step ``step``.

        Returns the gradient norm before clipping.

        Raises:
            NumericsError: a gradient is not finite, or there are no target tokens.
        """
        return self._stepper().step(step, denominator=target_tokens)

    def begin_probe(self, modules: Collection[str]) -> None:
        """From now on measure how much these linear modules matter, until `end_probe`.

        Raises:
            ProtocolError: a micro-batch or a probe is open, or a name is no linear module here.
        """
        for name in modules:
            linear_module(self._loaded().skeleton, name)
        self._open.begin_probe(modules)

    def end_probe(self) -> Mapping[str, float]:
        """Return Σ_j |w_j ∂L/∂w_j| of the summed loss by module, added up over micro-batches.

        Raises:
            ProtocolError: a micro-batch is still open, or there is no probe.
        """
        return self._open.end_probe()

    def discard(self) -> None:
        """Forget all kept micro-batches, accumulated gradients, counts and a probe."""
        self._open.discard()
        if self._optimizer is not None:
            self._optimizer.discard()

    def adapters(self) -> AdapterState:
        """Return copies of the trainable pairs, float32, by full module path."""
        return self._loaded().adapters.read()

    def wait(self) -> None:
        """Return when all that was asked for is done: a GPU works on by itself."""
        wait_for(self._device)

    def restart_memory_peak(self) -> None:
        """Finish what is under way, give back unused memory, count the GPU's peak anew."""
        self._memory.restart_memory_peak()

    def accelerator_memory(self) -> AcceleratorMemory | None:
        """Return what is used of the GPU's memory; None on the CPU."""
        return self._memory.accelerator_memory()

    def _run(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> _Kept:
        front = self._loaded()
        check_batch(batch, front.architecture, longest=self._training.max_length)
        seed = dropout_seed(
            self._training.seed,
            device_id=self._device_id,
            step=key.step,
            micro_batch=key.index,
            side="device",
        )
        front.adapters.dropout.begin(seed if train and self._open.probe is None else None)
        packing = Packing.of(batch.lengths, device=self._device)
        ids_N, labels_M = self._long(batch.input_ids), front.read(self._long(batch.labels), packing)
        types_N = None if batch.token_types is None else self._long(batch.token_types)
        if train and self._open.probe is not None:
            embedded_ND = front.embed(ids_N, packing, types_N)
            with watching(front.skeleton, self._open.probe.modules, source=embedded_ND) as watched:
                hidden_ND = front.run_blocks(embedded_ND, packing, first=0)
            return _Kept(hidden_ND, labels_M, packing, watched)
        with torch.set_grad_enabled(train):
            return _Kept(front(ids_N, packing, types_N), labels_M, packing)

    def _judge(
        self, key: MicroBatch, hidden_MD: torch.Tensor, kept: _Kept, *, train: bool
    ) -> tuple[torch.Tensor, float]:
        with torch.set_grad_enabled(train):
            judged = self._loaded().judge(hidden_MD, kept.labels_M)
        loss_sum = finite_loss(float(judged.loss.detach()), key)
        if not train:
            self._open.count(judged.counts)
        return judged.loss, loss_sum

    def _go_back(
        self, kept: _Kept, output: torch.Tensor, outer: torch.Tensor | None, *, what: str
    ) -> None:
        """Carry the gradient of ``output`` through the front: to learn, or to measure."""
        if kept.watched is not None and self._open.probe is not None:
            _, sums = kept.watched.backward(output, outer, what=what)
            self._open.probe.add(sums)
        elif output.requires_grad:
            torch.autograd.backward(output, outer)

    def _long(self, tokens_N: np.ndarray[Any, np.dtype[np.int32]]) -> torch.Tensor:
        return torch.from_numpy(tokens_N.astype(np.int64)).to(self._device)

    def _receive(self, frame: TensorFrame, shape: tuple[int, ...], *, what: str) -> torch.Tensor:
        dtype = self._training.wire_dtype
        return from_frame(frame, what=what, dtype=dtype, shape=shape, device=self._device)

    def _loaded(self) -> FrontModel:
        if self._front is None:
            raise ProtocolError("no part of the model is loaded yet")
        return self._front

    def _stepper(self) -> AdapterOptimizer:
        if self._optimizer is None:
            raise ProtocolError("no part of the model is loaded yet")
        return self._optimizer


def _parse(config_json: str) -> dict[str, Any]:
    try:
        config = json.loads(config_json)
    except ValueError as error:
        raise ModelError(f"config.json of the base model is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError("config.json of the base model is not a JSON object")
    return config
