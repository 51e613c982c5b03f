"""Least squares without negative coefficients, for a handful of them (numpy has only the plain).

Shape suffixes: P points, C coefficients.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

RIDGE = 1e-7
"""Weight of a coefficient's price beside the points' errors: decides only what these leave open."""
REFINEMENTS = 2
"""Passes that take back what the prices cost the coefficients which the points do decide."""
TOLERANCE = 1e-13
"""Below this a slope is rounding; above, the price of a coefficient, which is `RIDGE` squared."""


def nonnegative_least_squares(design_PC: Vector, target_P: Vector, prices_C: Vector) -> Vector:
    """Return x_C ≥ 0 that makes |design x - target|² least, by active sets. float64.

    Where several x do that equally well, the one of least Σ (price_c · |column c| · x_c)². Columns
    of very different size are no harm; a column of zeros gets 0.

    Method: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    norms_C = np.linalg.norm(design_PC, axis=0)
    scales_C = np.where(norms_C > 0, norms_C, 1.0)
    # The price as more rows to satisfy: with them the answer is always unique.
    ridge_C = RIDGE * prices_C
    rows = np.concatenate([design_PC / scales_C, np.diag(ridge_C)])
    x_C = np.zeros(len(prices_C))
    # First the price of x itself, then only of its change: that goes to 0 wherever the points
    # decide (the proximal point method), and nothing moves where they do not.
    for _ in range(1 + REFINEMENTS):
        x_C = _active_sets(rows, np.concatenate([target_P, ridge_C * x_C]), x_C)
    coefficients_C: Vector = x_C * (norms_C > 0) / scales_C
    return coefficients_C


def _active_sets(rows: Vector, wanted: Vector, x_C: Vector) -> Vector:
    free_C = x_C > 0
    if free_C.any():
        x_C = _descend(rows, wanted, x_C, free_C)
    # Each pass frees one coefficient and lowers the error, so no set comes twice; the bound is
    # for rounding alone.
    for _ in range(10 * len(x_C)):
        slope_C = rows.T @ (wanted - rows @ x_C)
        slope_C[free_C] = -np.inf
        best = int(np.argmax(slope_C))
        if slope_C[best] <= TOLERANCE:
            break
        free_C[best] = True
        x_C = _descend(rows, wanted, x_C, free_C)
    return x_C


def _descend(rows: Vector, wanted: Vector, x_C: Vector, free_C: Mask) -> Vector:
    """Go to the best x of the free coefficients, tying those at 0 that would turn negative."""
    while True:
        goal_C = np.zeros_like(x_C)
        goal_C[free_C] = np.linalg.lstsq(rows[:, free_C], wanted, rcond=None)[0]
        sinking = np.flatnonzero(free_C & (goal_C <= 0))
        if not len(sinking):
            return goal_C
        steps = x_C[sinking] / (x_C[sinking] - goal_C[sinking]).clip(min=np.finfo(float).tiny)
        first = int(np.argmin(steps))
        x_C = (x_C + min(1.0, float(steps[first])) * (goal_C - x_C)).clip(min=0.0)
        # Tied by its number and not by its value, so that each pass has one less.
        x_C[sinking[first]] = 0.0
        free_C[sinking[first]] = False
