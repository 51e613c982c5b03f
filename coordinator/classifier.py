"""The classifier between rounds: made once, averaged exactly, handed to those who train it.

It lives where the head lives. With `labels: server` there is one, on the server, and nothing to
aggregate. With `labels: device` each device trains its own copy in full, so the mean over the
devices that delivered, weighted by the examples that each learnt from, is exact: no factors,
nothing lost (FedAvg of one dense layer). All pure functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.aggregation import Contribution
from coordinator.handback import Holder
from shared.adapters import Array
from shared.architecture import ModelArchitecture
from shared.classifier_weights import ClassifierTensors, check_classifier

INITIAL_DEVIATION = 0.02
"""Of new weights: ``initializer_range`` of every supported family."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GlobalClassifier:
    """The weights that a round starts from; none where the run does not classify.

    ``sole``: the one device that had all the weight in the last aggregation. It already has
    what came out.
    """

    weights: ClassifierTensors = field(default_factory=dict)
    sole: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedClassifier:
    """A classifier as it is exported: the names of its classes, in their order, and its weights."""

    classes: Sequence[str]
    weights: ClassifierTensors

    @property
    def module(self) -> str:
        """The path of the one module that it is: what PEFT calls a module to save."""
        return next(iter(self.weights)).partition(".")[0]


def initial(architecture: ModelArchitecture, *, seed: int) -> GlobalClassifier:
    """Return a new classifier: weights from N(0, 0.02²) by the run's seed, biases zero."""
    shapes = architecture.classifier_shapes()
    return GlobalClassifier(weights={n: _new(n, shape, seed) for n, shape in shapes.items()})


def averaged(old: GlobalClassifier, contributions: Sequence[Contribution]) -> GlobalClassifier:
    """Return Σ p_i W_i, p_i the device's share of the examples of all who delivered one.

    In float64, rounded once. Where nobody delivered one, it stays as it is.
    """
    delivered = [one for one in contributions if one.classifier and one.target_tokens]
    total = sum(one.target_tokens for one in delivered)
    if not total:
        return GlobalClassifier(weights=old.weights)
    sole = delivered[0].device if len(delivered) == 1 else None
    weights = {
        name: _mean([(one.target_tokens / total, one.classifier[name]) for one in delivered])
        for name in old.weights
    }
    return GlobalClassifier(weights=weights, sole=sole)


def handed_to(
    device: str, classifier: GlobalClassifier, holders: Sequence[Holder]
) -> ClassifierTensors:
    """Return what ``device`` must be sent of it for a round of the devices ``holders``.

    Nothing where it is alone and goes on from what it trained itself: so its optimizer moments
    stay, and a run on one device is an ordinary run (law 1).
    """
    undisturbed = len(holders) == 1 and not holders[0].fresh and classifier.sole == device
    return {} if undisturbed else classifier.weights


def check(delivered: ClassifierTensors, *, like: GlobalClassifier) -> None:
    """Check what a device delivered before anything is done with it.

    Raises:
        NumericsError: weights are missing, misshapen, not of this run, or not finite.
    """
    check_classifier(delivered, {name: array.shape for name, array in like.weights.items()})


def _mean(weighted: Sequence[tuple[float, Array]]) -> Array:
    mean: Array = np.sum([share * one.astype(np.float64) for share, one in weighted], axis=0)
    return mean.astype(np.float32)


def _new(name: str, shape: tuple[int, ...], seed: int) -> Array:
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.float32)
    own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "big")
    values = np.random.default_rng(own).normal(0.0, INITIAL_DEVIATION, shape)
    return values.astype(np.float32)
