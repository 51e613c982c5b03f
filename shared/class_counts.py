"""How often a classifier was right, in whole numbers: what accuracy and F1 follow from exactly.

Counts of several micro-batches or devices add up; scores computed from them would not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from annotated_types import Ge, Lt

from shared.errors import NumericsError

_Count: TypeAlias = Annotated[int, Ge(0), Lt(2**63)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCount:
    """One class: how many examples are of it, were taken for it, and both at once."""

    actual: _Count
    predicted: _Count
    true_positives: _Count

    def __add__(self, other: ClassCount) -> ClassCount:
        """Return the counts over both sets of examples."""
        return ClassCount(
            actual=self.actual + other.actual,
            predicted=self.predicted + other.predicted,
            true_positives=self.true_positives + other.true_positives,
        )


ClassCounts: TypeAlias = tuple[ClassCount, ...]
"""One entry for each of the run's classes, in their order; empty: nothing was classified."""


def counted(actual: Sequence[int], predicted: Sequence[int], *, classes: int) -> ClassCounts:
    """Return the counts of examples given by their classes' numbers."""
    pairs = list(zip(actual, predicted, strict=True))
    return tuple(
        ClassCount(
            actual=sum(a == number for a, _ in pairs),
            predicted=sum(p == number for _, p in pairs),
            true_positives=sum(a == p == number for a, p in pairs),
        )
        for number in range(classes)
    )


def total(parts: Iterable[ClassCounts]) -> ClassCounts:
    """Return the sum; parts without counts add nothing.

    Raises:
        NumericsError: two parts are of different numbers of classes.
    """
    filled = [part for part in parts if part]
    if not filled:
        return ()
    summed = filled[0]
    for part in filled[1:]:
        if len(part) != len(summed):
            raise NumericsError(f"counts of {len(summed)} classes, and others of {len(part)}")
        summed = tuple(a + b for a, b in zip(summed, part, strict=True))
    return summed


def check_counts(counts: ClassCounts, *, classes: int, examples: int) -> None:
    """Check that counts are of this many classes (0: none) and of all ``examples``.

    Raises:
        NumericsError: they are not, or contradict themselves.
    """
    if len(counts) != (classes if examples else 0):
        raise NumericsError(f"counts of {len(counts)} classes, where the run has {classes}")
    sums = {sum(one.actual for one in counts), sum(one.predicted for one in counts)}
    if counts and sums != {examples}:
        raise NumericsError(f"counts of {sums} examples, where {examples} were evaluated")
    if any(one.true_positives > min(one.actual, one.predicted) for one in counts):
        raise NumericsError("counts with more true positives than examples or choices")
