"""Timing by repetition: a warm-up, medians and their spread, within a budget of time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from shared.clock import Clock

LEAST_REPEATS = 3
MOST_REPEATS = 15
PATIENCE = 2.0
"""A slow device may overdraw its budget by this factor to come to `LEAST_REPEATS`."""

Once: TypeAlias = Callable[[int], tuple[float, ...]]
"""Does the work for the n-th time; returns the seconds of each of its phases."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The median of some repeats in seconds, and (slowest - fastest) / median."""

    seconds: float
    spread: float


class TimeBudget:
    """Seconds shared out over parts: what one part leaves, the later ones have."""

    def __init__(self, seconds: float, *, parts: int, clock: Clock) -> None:
        """Start now."""
        self._clock = clock
        self._end_s = clock.monotonic_s() + seconds
        self._parts = parts

    @property
    def left_s(self) -> float:
        """What is left in all."""
        return max(0.0, self._end_s - self._clock.monotonic_s())

    def next_s(self) -> float:
        """Return what the next part may take."""
        share_s = self.left_s / max(1, self._parts)
        self._parts -= 1
        return share_s


def repeat(once: Once, *, budget_s: float, clock: Clock) -> tuple[Timing, ...]:
    """Call ``once`` again and again; return the timing of each of its phases.

    The first call warms up and is left out, unless it alone takes the whole budget: then it
    is all that a slow device gives. Otherwise at least one more is made, and up to
    `MOST_REPEATS` within the budget, of which the first `LEAST_REPEATS` may overdraw it by
    `PATIENCE`.
    """
    began_s = clock.monotonic_s()
    warm_up = once(0)
    if clock.monotonic_s() - began_s >= budget_s:
        return _timings([warm_up])
    taken: list[tuple[float, ...]] = []
    while len(taken) < MOST_REPEATS:
        taken.append(once(len(taken) + 1))
        spent_s = clock.monotonic_s() - began_s
        allowed_s = budget_s * (PATIENCE if len(taken) < LEAST_REPEATS else 1.0)
        if spent_s >= allowed_s:
            break
    return _timings(taken)


def stopwatch(work: Callable[[], object], clock: Clock) -> float:
    """Return how long ``work`` takes in seconds."""
    began_s = clock.monotonic_s()
    work()
    return clock.monotonic_s() - began_s


def _timings(taken: list[tuple[float, ...]]) -> tuple[Timing, ...]:
    return tuple(_timing(phase) for phase in zip(*taken, strict=True))


def _timing(seconds: tuple[float, ...]) -> Timing:
    # No clock is finer than a nanosecond, and a measured time is never 0.
    median = max(statistics.median(seconds), 1e-9)
    return Timing(median, (max(seconds) - min(seconds)) / median)
