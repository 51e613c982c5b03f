"""The onnx backend: a device's part without torch, in graphs that the coordinator exported.

Shape suffixes: N packed tokens, M of them that the head reads, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.backends.base import FrontBase, MicroBatch, TokenBatch, check_batch
from edge_agent.backends.frozen_weights import Array32
from edge_agent.backends.numpy_wire import from_frame, to_frame
from edge_agent.backends.onnx_engine import Engine, explained_out_of_memory
from edge_agent.backends.onnx_front import Passed
from edge_agent.backends.onnx_head import JudgedRows
from edge_agent.backends.onnx_memory import OnnxMemory
from edge_agent.backends.onnx_part import OnnxPart
from edge_agent.backends.open_work import OpenWork, finite_loss
from edge_agent.backends.packed_rows import rows_read_by_head
from shared.adapters import AdapterState, HeldAdapters
from shared.class_counts import ClassCounts
from shared.classifier_weights import ClassifierTensors
from shared.errors import NumericsError, ProtocolError
from shared.memory_use import AcceleratorMemory, trim
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

_explained = explained_out_of_memory()


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """What backward and head still need of one micro-batch.

    ``read_M``: which of the N rows the head reads; ``labels_M`` are theirs.
    """

    passed: Passed
    shape: tuple[int, int]
    read_M: npt.NDArray[np.int64] | None
    labels_M: npt.NDArray[np.int32]

    @property
    def head_shape(self) -> tuple[int, int]:
        """(M, D)."""
        return len(self.labels_M), self.shape[1]


class OnnxBackend:
    """A `Backend` of onnxruntime and numpy. Not thread-safe: it belongs to the agent's thread.

    Whatever it is asked may also end in a `PlanError`: the memory is full.
    """

    name = "onnx"
    needs_graphs = True

    def __init__(self, device: str | None = None, *, threads: int | None = None) -> None:
        """Compute on ``device``: ``cpu``, ``cuda``, ``cuda:1``, ``tensorrt``; see `Engine`.

        Raises:
            ConfigError: there is no such device here, or it was asked for and does not load.
        """
        self._engine = Engine(device, threads=threads)
        self._memory = _loaded_on(self._engine)
        self._part: OnnxPart | None = None
        self._open: OpenWork[_Kept] = OpenWork()

    @property
    def accelerator(self) -> str | None:
        """The GPU's name; None on the CPU."""
        return None if self._memory is None else self._memory.name

    @property
    def computes_with(self) -> str:
        """Onnxruntime's version and execution provider, and the number of the GPU."""
        return str(self._engine)

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
            ModelError: a file lacks a tensor, a graph is missing or cannot be opened, or the
                architecture is not supported.
            PlanError: the split layer does not exist, or max_length exceeds the positions.
        """
        if self._part is not None:
            # The old part first, so that a device never needs room for two.
            self._part = None
            self.discard()
            trim()
        self._part = OnnxPart.build(
            self._engine,
            base,
            device_id=device_id,
            training=training,
            lora=lora,
            optimizer=optimizer,
        )

    @_explained
    def set_adapters(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """Replace the named modules' adapters and reset their optimizer moments.

        What is kept of an open step is forgotten: it belongs to the old adapters.

        Raises:
            ProtocolError: a name is no linear module of this part.
            NumericsError: a factor has the wrong shape or is not finite; nothing changed.
        """
        part = self._loaded()
        part.front.replace(adapters, fold=fold)
        self.discard()
        part.follow()

    @_explained
    def set_classifier(self, weights: ClassifierTensors) -> None:
        """Replace the classifier's weights and reset their optimizer moments.

        Raises:
            ProtocolError: there is no classifier here.
            NumericsError: they are not of its names and shapes, or not finite; nothing changed.
        """
        part = self._loaded()
        if part.head is None:
            raise ProtocolError("weights of a classifier came, but the head is on the server")
        part.head.replace(weights)
        self.discard()
        part.follow()

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
        training = self._loaded().training
        hidden_ND, kept = self._run(key, batch, train=train)
        what = f"activations of step {key.step}, micro-batch {key.index}"
        frame = to_frame(hidden_ND, dtype=training.wire_dtype, what=what)
        if train or training.labels == "device":
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
        gradient_ND = self._receive(gradient, kept.shape, what=f"gradient of {key}")
        self._open.close(key, train=True)
        self._go_back(kept, gradient_ND, what=str(key))

    @_explained
    def head(
        self, key: MicroBatch, hidden: TensorFrame, *, train: bool
    ) -> tuple[float, TensorFrame | None]:
        """Return the summed loss and, with ``train``, its gradient (M, D) in the wire dtype.

        ``forward`` of the same key came before and kept the labels.

        Raises:
            NumericsError: wrong shape or dtype, NaN or infinity, received or in the loss.
            ProtocolError: no such micro-batch is open, or the head is on the server.
        """
        kept = self._open.find(key, train=train)
        hidden_MD = self._receive(hidden, kept.head_shape, what=f"hidden states of {key}")
        judged = self._judge(key, hidden_MD, kept, train=train)
        if judged.gradient_MD is None:
            self._open.close(key, train=False)
            return judged.loss_sum, None
        dtype = self._loaded().training.wire_dtype
        frame = to_frame(judged.gradient_MD, dtype=dtype, what=f"head gradient of {key}")
        self._learn(judged)
        return judged.loss_sum, frame

    @_explained
    def whole(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> float:
        """Return the summed loss where the device holds all blocks and the head.

        With ``train``, gradients are accumulated.

        Raises:
            NumericsError: the loss is not finite; nothing was accumulated.
            ModelError: a token id or a length that this model does not have.
        """
        hidden_ND, kept = self._run(key, batch, train=train)
        hidden_MD = hidden_ND if kept.read_M is None else hidden_ND[kept.read_M]
        judged = self._judge(key, hidden_MD, kept, train=train)
        if judged.gradient_MD is None:
            return judged.loss_sum
        gradient_ND = judged.gradient_MD
        if kept.read_M is not None:
            gradient_ND = np.zeros(kept.shape, dtype=np.float32)
            gradient_ND[kept.read_M] = judged.gradient_MD
        self._go_back(kept, gradient_ND, what=str(key))
        self._learn(judged)
        return judged.loss_sum

    @_explained
    def step(self, step: int, *, target_tokens: int) -> float:
        """Divide the accumulated gradients by ``target_tokens``, clip, take step ``step``.

        Returns the gradient norm before clipping.

        Raises:
            NumericsError: a gradient is not finite, or there are no target tokens.
        """
        return self._loaded().step(step, target_tokens=target_tokens)

    def begin_probe(self, modules: Collection[str]) -> None:
        """From now on measure how much these linear modules matter, until `end_probe`.

        Raises:
            ProtocolError: a micro-batch or a probe is open, or a name is no linear module here.
        """
        for name in modules:
            self._loaded().front.module(name)
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
        if self._part is not None:
            self._part.optimizer.discard()

    def adapters(self) -> AdapterState:
        """Return copies of the trainable pairs, float32, by full module path."""
        return self._loaded().front.read()

    def wait(self) -> None:
        """Return at once: every run of a graph ends before its results are returned."""

    def restart_memory_peak(self) -> None:
        """Give back unused memory."""
        trim()

    def accelerator_memory(self) -> AcceleratorMemory | None:
        """Return what is used of the GPU's memory, see `OnnxMemory`; None on the CPU.

        Raises:
            ConfigError: nothing says what is used of it.
        """
        return None if self._memory is None else self._memory.taken()

    def _run(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> tuple[Array32, _Kept]:
        part = self._loaded()
        check_batch(batch, part.architecture, longest=part.training.max_length)
        learns = train and self._open.probe is None
        probes_from = 0 if train else None
        hidden_ND, passed = part.front.forward(
            batch,
            keep_from=part.front.lowest if learns else probes_from,
            dropout_seed=part.seed(key.step, key.index) if learns else None,
        )
        read_M = rows_read_by_head(part.architecture, batch.lengths)
        labels_M = batch.labels if read_M is None else batch.labels[read_M]
        rows, width = hidden_ND.shape
        return hidden_ND, _Kept(passed, (rows, width), read_M, labels_M)

    def _judge(
        self, key: MicroBatch, hidden_MD: Array32, kept: _Kept, *, train: bool
    ) -> JudgedRows:
        head = self._loaded().head
        if head is None:
            raise ProtocolError("this part of the model has no head")
        judged = head.judge(hidden_MD, kept.labels_M, train=train)
        finite_loss(judged.loss_sum, key)
        if not train:
            self._open.count(judged.counts)
        return judged

    def _go_back(self, kept: _Kept, gradient_ND: Array32, *, what: str) -> None:
        """Carry a gradient through the front: to learn, or to measure."""
        part = self._loaded()
        if self._open.probe is None:
            for name, (a_RI, b_OR) in part.front.backward(kept.passed, gradient_ND).items():
                part.optimizer.accumulate(name, (b_OR,) if part.freeze_a else (a_RI, b_OR))
            return
        modules = self._open.probe.modules
        sums = part.front.importance(kept.passed, gradient_ND, modules=modules)
        bad = sorted(name for name, value in sums.items() if not math.isfinite(value))
        if bad:
            raise NumericsError(f"{what}: the importance of {bad[0]} is not finite")
        self._open.probe.add(sums)

    def _learn(self, judged: JudgedRows) -> None:
        if self._open.probe is None:
            for name, gradient in judged.classifier_gradients.items():
                self._loaded().optimizer.accumulate(name, (gradient,))

    def _receive(self, frame: TensorFrame, shape: tuple[int, ...], *, what: str) -> Array32:
        dtype = self._loaded().training.wire_dtype
        return from_frame(frame, what=what, dtype=dtype, shape=shape)

    def _loaded(self) -> OnnxPart:
        if self._part is None:
            raise ProtocolError("no part of the model is loaded yet")
        return self._part


def _loaded_on(engine: Engine) -> OnnxMemory | None:
    """Load the engine's provider, and return the GPU's memory that it computes in, if any."""
    memory = OnnxMemory(engine.index) if engine.is_gpu else None
    engine.load_provider()
    if memory is None:
        return None
    if engine.is_gpu:
        memory.context_made()
        return memory
    memory.close()
    return None
