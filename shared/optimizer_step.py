"""What every optimizer step decides, whoever computes it: rates, scale, and when there is none.

Every module has a count of steps since its moments were last fresh. Moments that are fresh
at the run's first step have the schedule's own warm-up; moments that a hand-back (or a new
plan, or a late joiner) makes fresh later climb again over ``rewarm_steps``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from shared.errors import NumericsError
from shared.schedule import learning_rate
from shared.terms import OptimizerTerms

_CLIP_EPSILON = 1e-6
"""Added to the norm when clipping, as in torch's clip_grad_norm_."""


class StepCounts:
    """How long ago the moments of each followed module were fresh, and so its learning rate."""

    def __init__(self, terms: OptimizerTerms, *, total_steps: int) -> None:
        """Start without any module; see `follow`."""
        self._terms = terms
        self._total_steps = total_steps
        self._since_fresh: dict[str, int] = {}
        self._from_the_start: set[str] = set()

    def follow(self, names: Iterable[str], *, kept: Collection[str]) -> None:
        """Count for these modules from now on: the ``kept`` ones go on, all others are fresh."""
        old = self._since_fresh
        self._since_fresh = {name: old[name] if name in kept else 0 for name in names}
        self._from_the_start.intersection_update(kept)

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the modules in groups that have equal rates in every step from now on."""
        groups: dict[tuple[int, bool], list[str]] = {}
        for name in self._since_fresh:
            groups.setdefault(self.of(name), []).append(name)
        return tuple(map(tuple, groups.values()))

    def take(self, step: int) -> Mapping[str, float]:
        """Return every module's rate in global step ``step``, and count the step."""
        if step == 0:
            self._from_the_start.update(self._since_fresh)
        rates = {name: self._rate(name, step) for name in self._since_fresh}
        for name in self._since_fresh:
            self._since_fresh[name] += 1
        return rates

    def of(self, name: str) -> tuple[int, bool]:
        """Return a module's steps since fresh, and whether that was at the run's first step."""
        return self._since_fresh[name], name in self._from_the_start

    def restore(self, name: str, *, since_fresh: int, from_the_start: bool) -> None:
        """Set what `of` returns of a followed module."""
        self._since_fresh[name] = since_fresh
        (self._from_the_start.add if from_the_start else self._from_the_start.discard)(name)

    def _rate(self, name: str, step: int) -> float:
        since_fresh, from_the_start = self.of(name)
        return learning_rate(
            self._terms,
            step,
            total_steps=self._total_steps,
            steps_since_reset=None if from_the_start else since_fresh,
        )


def check_target_tokens(denominator: int, *, step: int) -> None:
    """Check that there is something to divide the gradients of a step by.

    Raises:
        NumericsError: there is not.
    """
    if denominator < 1:
        raise NumericsError(f"step {step} has no target tokens: there is nothing to learn from")


def gradient_scale(
    norm: float, *, denominator: int, step: int, max_grad_norm: float
) -> tuple[float, float]:
    """Return the norm of the mean gradient, and the factor that divides and clips the sum.

    ``norm`` is of the summed gradients, ``max_grad_norm`` the limit of the mean's (0: none).

    Raises:
        NumericsError: the norm is not finite.
    """
    mean = norm / denominator
    if not math.isfinite(mean):
        raise NumericsError(
            f"the gradients of step {step} are not finite: training diverged; lower "
            "optimizer.learning_rate, or use dtype or wire_dtype bfloat16 instead of float16"
        )
    clipping = min(1.0, max_grad_norm / (mean + _CLIP_EPSILON)) if max_grad_norm else 1.0
    return mean, clipping / denominator
