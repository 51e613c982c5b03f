"""What a backend does: hold a device's part of the model and train its adapters.

The agent speaks to every backend in numpy and `TensorFrame`, so it never imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.adapters import AdapterState, HeldAdapters
from shared.architecture import ModelArchitecture
from shared.class_counts import ClassCounts
from shared.classifier_weights import ClassifierTensors
from shared.errors import ModelError, ProtocolError
from shared.memory_use import AcceleratorMemory
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

NO_TARGET = -100
"""The label of a position that predicts nothing, as in torch's cross_entropy."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """One micro-batch of B sequences, packed without padding: N = sum(lengths) tokens.

    ``input_ids`` (N,) int32. ``labels`` (N,) int32: the token to predict *at* each position
    (already shifted: the next token), or the class of the sequence at the one position that a
    classifier reads; `NO_TARGET` where there is none. ``token_types`` (N,) int32: 1 in the second
    text of a pair, for a model that tells them apart; None: 0 everywhere.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    lengths: tuple[int, ...]
    token_types: npt.NDArray[np.int32] | None = None

    @property
    def target_tokens(self) -> int:
        """How many positions predict something: the weight of this micro-batch's loss."""
        return int(np.count_nonzero(self.labels != NO_TARGET))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Names one micro-batch of one device: the key of saved state and of dropout's seed."""

    step: int
    index: int


@dataclass(frozen=True, slots=True)
class FrontBase:
    """The frozen part of the model for one device: verified files, by piece name.

    ``files`` maps ``embeddings``, ``block.<j>`` and, with the head on the device,
    ``final_norm`` and (untied) ``head`` to safetensors files that hold the tensors under
    their full Hugging Face names. ``graphs``: ONNX files by the names of `shared.graphs`, for a
    backend that needs them.
    """

    config_json: str
    files: Mapping[str, Path]
    split_layer: int
    graphs: Mapping[str, Path] = field(default_factory=dict)


class Backend(Protocol):
    """The front of a model, and its head with `labels: device`, under LoRA training."""

    name: str
    needs_graphs: bool
    """Whether it has no model code of its own, and computes with `FrontBase.graphs`."""

    @property
    def accelerator(self) -> str | None:
        """The name of the GPU that it computes on; None on the CPU."""

    @property
    def computes_with(self) -> str:
        """The library that computes, its version, and what of the device it computes on."""

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
        """

    def set_adapters(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """Replace the named modules' adapters and reset their optimizer moments.

        With ``fold`` each ``frozen`` pair is added to the base weight instead of held.
        Rank and module set may differ from before; modules not named stay as they are.
        """

    def set_classifier(self, weights: ClassifierTensors) -> None:
        """Replace the classifier's weights and reset their optimizer moments.

        Raises:
            ProtocolError: there is no classifier here.
            NumericsError: they are not of its names and shapes, or not finite; nothing changed.
        """

    def classifier(self) -> ClassifierTensors:
        """Return copies of the classifier's weights, float32; none where there is none here."""

    def take_counts(self) -> ClassCounts:
        """Return how the classifier chose in evaluations here since the last time."""

    def forward(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> TensorFrame:
        """Return the activations (N, D) in the wire dtype.

        With ``train``, keep what backward needs.
        """

    def backward(self, key: MicroBatch, gradient: TensorFrame) -> None:
        """Accumulate adapter gradients from the gradient (N, D) of the activations."""

    def head(
        self, key: MicroBatch, hidden: TensorFrame, *, train: bool
    ) -> tuple[float, TensorFrame | None]:
        """Return the summed loss of the micro-batch and, with ``train``, its gradient (M, D).

        ``hidden`` (M, D): what the head reads of the N tokens: all, or a classifier one of each
        sequence. The gradient is in the wire dtype. ``forward`` of the same key came before and
        kept the labels.
        """

    def whole(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> float:
        """Return the summed loss where the device holds all blocks and the head.

        With ``train``, accumulate gradients.
        """

    def step(self, step: int, *, target_tokens: int) -> float:
        """Divide the accumulated gradients by ``target_tokens``, clip, take step ``step``.

        Returns the gradient norm before clipping.
        """

    def begin_probe(self, modules: Collection[str]) -> None:
        """From now on measure how much these linear modules matter, until `end_probe`.

        In between, training micro-batches teach nothing: ``forward``, ``head``, ``backward``
        and ``whole`` go as with ``train``, but without dropout, and adapters, accumulated
        gradients and optimizer stay as they are. `discard` gives the probe up.

        Raises:
            ProtocolError: a micro-batch or a probe is open, or a name is no linear module here.
        """

    def end_probe(self) -> Mapping[str, float]:
        """Return Σ_j |w_j ∂L/∂w_j| of the summed loss by module, added up over micro-batches.

        Raises:
            ProtocolError: a micro-batch is still open, or there is no probe.
        """

    def discard(self) -> None:
        """Forget all kept micro-batches, accumulated gradients, counts and a probe."""

    def adapters(self) -> AdapterState:
        """Return copies of the trainable pairs, float32, by full module path."""

    def wait(self) -> None:
        """Return when all that was asked for is done: an accelerator works on by itself."""

    def restart_memory_peak(self) -> None:
        """Finish what is under way, give back unused memory, count an accelerator's peak anew."""

    def accelerator_memory(self) -> AcceleratorMemory | None:
        """Return what is used of an accelerator's memory; None where the CPU computes."""


def check_batch(batch: TokenBatch, architecture: ModelArchitecture, *, longest: int) -> None:
    """Check that a micro-batch is one for this model.

    Raises:
        ProtocolError: its parts do not belong together, or a class does not exist.
        ModelError: a token id or a length that this model does not have.
    """
    if len(batch.input_ids) != sum(batch.lengths) or len(batch.labels) != len(batch.input_ids):
        raise ProtocolError(
            f"a micro-batch of {len(batch.input_ids)} tokens, {len(batch.labels)} labels and "
            f"lengths that add up to {sum(batch.lengths)}"
        )
    vocab_size, largest = architecture.vocab_size, int(batch.input_ids.max())
    target = int(batch.labels.max())
    if architecture.classifies and target >= architecture.class_count:
        raise ProtocolError(f"class {target} of {architecture.class_count} classes")
    largest = largest if architecture.classifies else max(largest, target)
    if largest >= vocab_size or int(batch.input_ids.min()) < 0:
        raise ModelError(
            f"token id {largest} does not exist in a model with {vocab_size} words: "
            "tokenizer and weights are not of the same model"
        )
    if max(batch.lengths) > longest:
        raise ModelError(f"a sequence of {max(batch.lengths)} tokens; max_length is {longest}")
