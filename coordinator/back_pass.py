"""One micro-batch's way through the back of the model: what came is checked, what goes is framed.

Shape suffixes: N packed tokens, M of them that the head reads, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.class_counts import ClassCounts
from shared.errors import NumericsError, ProtocolError
from shared.modeling.heads import Judged
from shared.modeling.packing import Packing
from shared.modeling.splitting import BackModel
from shared.modeling.wire import from_frame, to_frame
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame
from shared.terms import TrainingTerms


@dataclass(frozen=True, slots=True, order=True)
class MicroBatchKey:
    """Names one micro-batch of one step of one device."""

    step: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchInput:
    """What a device sent of one micro-batch, unchecked.

    ``hidden`` (N, D) in the wire dtype, N = sum(lengths); ``labels`` (N,) int32 where the head
    is on the server, -100 where a position predicts nothing, else None: tokens, or classes.
    """

    split_layer: int
    lengths: Sequence[int]
    hidden: TensorFrame
    labels: TensorFrame | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HiddenResult:
    """The back's output (M, D) in the wire dtype, for the head on the device."""

    hidden: TensorFrame


@dataclass(frozen=True, slots=True, eq=False)
class GradientResult:
    """The gradient (N, D) of the summed loss with respect to what the device sent."""

    gradient: TensorFrame
    loss_sum: float


@dataclass(frozen=True, slots=True, eq=False)
class LossResult:
    """The summed loss of an evaluation micro-batch, and how a classifier chose."""

    loss_sum: float
    counts: ClassCounts = ()


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """A micro-batch that passed the checks: ``hidden_ND`` in the compute dtype, no history."""

    hidden_ND: torch.Tensor
    labels_M: torch.Tensor | None
    packing: Packing
    split_layer: int


class BackPass:
    """The back of the model as micro-batches meet it. Nothing is kept from one to the next."""

    def __init__(self, back: BackModel, training: TrainingTerms) -> None:
        """Let micro-batches pass through ``back`` under the run's terms."""
        self.back = back
        self._training = training

    def read(self, sent: MicroBatchInput, *, name: str) -> Arrived:
        """Check what a device sent; ``name`` says in an error which micro-batch it is.

        Raises:
            NumericsError: a shape, dtype, length or label that does not belong, or NaN or
                infinity.
            ProtocolError: labels are missing or unwanted, or the blocks are not held.
        """
        self._check(sent, name=name)
        packing = Packing.of(sent.lengths, device=self.back.device)
        labels_M = self._labels(sent, packing, name=name)
        shape = (sum(sent.lengths), self.back.architecture.hidden_size)
        hidden_ND = self._receive(sent.hidden, shape, what=f"activations of {name}")
        return Arrived(hidden_ND.to(self.back.dtype), labels_M, packing, sent.split_layer)

    def run(self, arrived: Arrived) -> torch.Tensor:
        """Return the back's output (M, D), as far as the head reads it."""
        output_ND: torch.Tensor = self.back(
            arrived.hidden_ND, arrived.packing, split_layer=arrived.split_layer
        )
        return self.back.read(output_ND, arrived.packing)

    def judge(
        self, hidden_MD: torch.Tensor, labels_M: torch.Tensor, *, name: str
    ) -> tuple[Judged, float]:
        """Return the summed loss, differentiable in ``hidden_MD`` and as a number, and counts.

        Raises:
            NumericsError: it is not finite.
        """
        judged = self.back.judge(hidden_MD, labels_M)
        loss_sum = float(judged.loss.detach())
        if not math.isfinite(loss_sum):
            raise NumericsError(
                f"the loss of {name} is {loss_sum}: training diverged; lower "
                "optimizer.learning_rate"
            )
        return judged, loss_sum

    def head_gradient(
        self, gradient: TensorFrame, hidden_MD: torch.Tensor, *, name: str
    ) -> torch.Tensor:
        """Return the head's gradient of ``hidden_MD``, checked.

        Raises:
            NumericsError: wrong shape or dtype, NaN or infinity.
        """
        return self._receive(gradient, tuple(hidden_MD.shape), what=f"head gradient of {name}")

    def frame(self, tensor: torch.Tensor, *, what: str) -> TensorFrame:
        """Return an answer in the wire dtype.

        Raises:
            NumericsError: it holds NaN or infinity.
        """
        return to_frame(tensor, dtype=self._training.wire_dtype, what=what)

    def _check(self, sent: MicroBatchInput, *, name: str) -> None:
        blocks, lengths = self.back.blocks, sent.lengths
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

    def _labels(self, sent: MicroBatchInput, packing: Packing, *, name: str) -> torch.Tensor | None:
        if (sent.labels is None) != (self._training.labels == "device"):
            raise ProtocolError(
                f"{name}: labels {'missing' if sent.labels is None else 'sent'}, but this run "
                f"has labels: {self._training.labels}"
            )
        if sent.labels is None:
            return None
        shape = (sum(sent.lengths),)
        device = self.back.device
        what = f"labels of {name}"
        labels_N = from_frame(sent.labels, what=what, dtype="int32", shape=shape, device=device)
        architecture = self.back.architecture
        if bool((labels_N >= architecture.output_count).any()):
            kind, of = ("class", "classes") if architecture.classifies else ("token id", "words")
            raise NumericsError(
                f"{what}: {kind} {int(labels_N.max())} of {architecture.output_count} {of}"
            )
        labels_M = self.back.read(labels_N.long(), packing)
        if architecture.classifies and bool((labels_M < 0).any()):
            raise NumericsError(f"{what}: a sequence without a class where the classifier reads")
        return labels_M

    def _receive(self, frame: TensorFrame, shape: tuple[int, ...], *, what: str) -> torch.Tensor:
        dtype, device = self._training.wire_dtype, self.back.device
        return from_frame(frame, what=what, dtype=dtype, shape=shape, device=device)


def name_of(device_id: DeviceId, key: MicroBatchKey, *, purpose: str = "") -> str:
    """Return what an error calls a micro-batch."""
    return f"{device_id}, {purpose}step {key.step}, micro-batch {key.micro_batch}"
