"""Differences as the laws measure them: relative in the norm of each tensor."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np

from shared.adapters import Array, LoraPair


def relative(actual: Array, expected: Array) -> float:
    """Return ‖actual - expected‖ / ‖expected‖ in float64."""
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def largest_difference(
    actual: Mapping[Hashable, LoraPair], expected: Mapping[Hashable, LoraPair]
) -> float:
    """Return the largest `relative` difference of any factor; both must name the same pairs."""
    assert actual.keys() == expected.keys()
    return max(
        max(relative(pair.a_RI, expected[n].a_RI), relative(pair.b_OR, expected[n].b_OR))
        for n, pair in actual.items()
    )
