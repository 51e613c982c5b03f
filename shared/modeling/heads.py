"""What stands after the last block, by task: what it reads, its loss, what of it is trained.

A part of the model calls its head and does not ask which task it is for.

Shape suffixes: M rows with a target, N packed tokens, D hidden size, V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from shared.architecture import ModelArchitecture
from shared.class_counts import ClassCounts, counted
from shared.classifier_weights import ClassifierTensors, check_classifier
from shared.errors import ProtocolError
from shared.modeling.loss import summed_cross_entropy


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The summed loss (float64 scalar, differentiable) and, of a classifier, how it chose."""

    loss: torch.Tensor
    counts: ClassCounts = ()


class Head(Protocol):
    """The end of a model for one task."""

    def judge(self, hidden_MD: torch.Tensor, targets_M: torch.Tensor) -> Judged:
        """Return the summed cross entropy of rows with these targets."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what is trained in full, by full name: a classifier; of words, nothing."""

    def replace(self, tensors: ClassifierTensors) -> None:
        """Take these weights for what is trained; their optimizer moments are void.

        Raises:
            ProtocolError: nothing is trained here.
            NumericsError: they are not those of this head, in shape or at all, or are not
                finite; nothing changed.
        """

    def tensors(self) -> ClassifierTensors:
        """Return copies of what is trained, float32."""


def build_head(skeleton: nn.Module, architecture: ModelArchitecture) -> Head:
    """Return the head whose modules ``skeleton`` holds."""
    family = architecture.family
    norm = None if family.final_norm is None else skeleton.get_submodule(family.final_norm)
    if architecture.classifies:
        pooler = family.classifier.pooler
        frozen = None if pooler is None else skeleton.get_submodule(pooler)
        return ClassifierHead(skeleton, architecture, norm=norm, pooler=frozen)
    tied = architecture.tied_embeddings
    projection = family.token_embedding if tied else architecture.frozen_head
    return WordHead(norm, skeleton.get_parameter(f"{projection}.weight"))


class WordHead:
    """Causal language model: final norm and a frozen projection to the vocabulary."""

    def __init__(self, norm: nn.Module | None, weight_VD: torch.Tensor) -> None:
        """Read off ``weight_VD`` after ``norm``."""
        self._norm = norm
        self._weight_VD = weight_VD

    def judge(self, hidden_MD: torch.Tensor, targets_M: torch.Tensor) -> Judged:
        """Return the summed cross entropy of the next tokens ``targets_M``."""
        normed_MD = hidden_MD if self._norm is None else self._norm(hidden_MD)
        return Judged(summed_cross_entropy(normed_MD, self._weight_VD, targets_M))

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return nothing: it is frozen."""
        return {}

    def replace(self, tensors: ClassifierTensors) -> None:
        """Refuse weights.

        Raises:
            ProtocolError: there are some.
        """
        if tensors:
            raise ProtocolError("weights of a classifier came, but this run learns to write text")

    def tensors(self) -> ClassifierTensors:
        """Return nothing: it is frozen."""
        return {}


class ClassifierHead:
    """Sequence classification: final norm or pooler (frozen), then a classifier in float32.

    It is trained in full beside the adapters, and float32 whatever the base's dtype, as they
    are.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        architecture: ModelArchitecture,
        *,
        norm: nn.Module | None,
        pooler: nn.Module | None,
    ) -> None:
        """Start with a classifier that is zero everywhere; see `replace`."""
        self._skeleton = skeleton
        self._shapes = architecture.classifier_shapes()
        self._classes = architecture.class_count
        self._module = architecture.family.classifier.module
        self._norm = norm
        self._pooler = pooler

    def judge(self, hidden_MD: torch.Tensor, targets_M: torch.Tensor) -> Judged:
        """Return the summed cross entropy of the classes ``targets_M``, and the counts."""
        logits_MK = self.logits(hidden_MD)
        chosen_M = logits_MK.detach().argmax(dim=1)
        counts = counted(targets_M.tolist(), chosen_M.tolist(), classes=self._classes)
        losses_M = functional.cross_entropy(logits_MK, targets_M, reduction="none")
        return Judged(losses_M.sum(dtype=torch.float64), counts)

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Return the logits (M, K) in float32."""
        pooled_MD = hidden_MD if self._norm is None else self._norm(hidden_MD)
        if self._pooler is not None:
            pooled_MD = torch.tanh(self._pooler(pooled_MD))
        classifier = self._skeleton.get_submodule(self._module)
        # RoBERTa's takes whole sequences and reads the first token: each row is one of length 1.
        logits: torch.Tensor = classifier(pooled_MD.float().unsqueeze(1))
        return logits.reshape(-1, self._classes)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the classifier's weights by full name."""
        return {name: self._skeleton.get_parameter(name) for name in self._shapes}

    def replace(self, tensors: ClassifierTensors) -> None:
        """Take these weights; their optimizer moments are void.

        Raises:
            NumericsError: as `check_classifier`; nothing changed.
        """
        check_classifier(tensors, self._shapes)
        for name, array in tensors.items():
            owner, _, leaf = name.rpartition(".")
            device = self._skeleton.get_parameter(name).device
            copied = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
            setattr(self._skeleton.get_submodule(owner), leaf, nn.Parameter(copied.to(device)))

    def tensors(self) -> ClassifierTensors:
        """Return copies of the classifier's weights, float32."""
        return {n: p.detach().cpu().numpy().copy() for n, p in self.parameters().items()}
