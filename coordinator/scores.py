"""Accuracy and F1 of a classifier, from whole counts over all devices: exact, not averaged. Pure.

F1 of a class is 2 TP / (actual + predicted), and 0 where it neither occurs nor was chosen. As
GLUE reports MRPC and QQP, two classes have one F1, that of the second: the positive. The micro
average over classes needs no name of its own: where each example has one class it is accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.class_counts import ClassCount, ClassCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of 1. ``f1``: of the positive class where there are two classes, else ``f1_macro``."""

    accuracy: float
    f1: float
    f1_macro: float

    def by_metric(self) -> Mapping[str, float]:
        """Return them by their names in ``metrics.jsonl``."""
        return {
            "eval/accuracy": self.accuracy,
            "eval/f1": self.f1,
            "eval/f1_macro": self.f1_macro,
        }


def scores_of(counts: ClassCounts) -> Scores | None:
    """Return the scores that counts come to; None where nothing was classified."""
    examples = sum(one.actual for one in counts)
    if not examples:
        return None
    macro = sum(map(_f1, counts)) / len(counts)
    return Scores(
        accuracy=sum(one.true_positives for one in counts) / examples,
        f1=_f1(counts[1]) if len(counts) == 2 else macro,
        f1_macro=macro,
    )


def _f1(one: ClassCount) -> float:
    return 2 * one.true_positives / max(1, one.actual + one.predicted)
