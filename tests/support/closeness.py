"""Differences as the laws measure them: relative in the norm of each tensor."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping

import numpy as np

from shared.adapters import Array, LoraPair


def relative(actual: Array, expected: Array) -> float:
    """Return ‖actual - expected‖ / ‖expected‖ in float64; of nothing expected, 0 or infinity."""
    apart = float(np.linalg.norm(actual.astype(np.float64) - expected))
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    if norm == 0.0:
        return 0.0 if apart == 0.0 else math.inf
    return apart / norm


def largest(numbers: Iterable[float]) -> float:
    """Return the largest number, and NaN where there is one: `max` may pass over it."""
    return float(np.max(list(numbers)))


def largest_difference(
    actual: Mapping[Hashable, LoraPair], expected: Mapping[Hashable, LoraPair]
) -> float:
    """Return the largest `relative` difference of any factor; both must name the same pairs."""
    assert actual.keys() == expected.keys()
    return largest(
        relative(mine, its)
        for name, pair in actual.items()
        for mine, its in ((pair.a_RI, expected[name].a_RI), (pair.b_OR, expected[name].b_OR))
    )
