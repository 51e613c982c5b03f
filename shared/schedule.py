"""The learning rate as a pure function of the global step: no side needs the other's clock."""

from __future__ import annotations

import math

from shared.terms import OptimizerTerms


def learning_rate(
    terms: OptimizerTerms, step: int, *, total_steps: int, steps_since_reset: int | None = None
) -> float:
    """Return the rate of global step ``step`` (counted from 0) of ``total_steps``.

    ``steps_since_reset`` is how many optimizer steps were taken since the moments of these
    parameters were last reset by a hand-back; None where they never were.
    """
    rate = terms.learning_rate * _shape(terms, step, total_steps)
    if step < terms.warmup_steps:
        rate *= (step + 1) / terms.warmup_steps
    if steps_since_reset is not None and steps_since_reset < terms.rewarm_steps:
        rate *= (steps_since_reset + 1) / terms.rewarm_steps
    return rate


def _shape(terms: OptimizerTerms, step: int, total_steps: int) -> float:
    span = max(1, total_steps - terms.warmup_steps)
    done = min(1.0, max(0.0, (step - terms.warmup_steps) / span))
    if terms.schedule == "constant":
        return 1.0
    fall = 1.0 - done if terms.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    low = terms.min_learning_rate_ratio
    return low + (1.0 - low) * fall
