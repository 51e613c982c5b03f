"""What follows from a comparison's runs: means over seeds, a common target, who reached it when.

Seeds of one method are evaluated after the same steps, so a mean over seeds is taken step by step.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tests.testbed.comparison.results import Comparison, Kind, MethodRun, Point

SUBJECT = "hsplitlora"
"""The method that the others are compared with."""

Measure: TypeAlias = Callable[[Point], float]

STEPS: Measure = operator.attrgetter("step")
SECONDS: Measure = operator.attrgetter("seconds")
BYTES: Measure = operator.attrgetter("bytes")
PERPLEXITY: Measure = operator.attrgetter("perplexity")
LOSS: Measure = operator.attrgetter("loss")


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds: mean, least and largest; ``count`` of the seeds that have it."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of the finite values; NaN where there is none."""
        known = [value for value in values if math.isfinite(value)]
        if not known:
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(statistics.fmean(known), min(known), max(known), len(known))


@dataclass(frozen=True, slots=True)
class Curve:
    """Means over seeds, point by point, with what lies between the least and the largest."""

    xs: list[float]
    ys: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True, slots=True)
class Method:
    """All runs of one method, a seed each."""

    name: str
    kind: Kind
    runs: tuple[MethodRun, ...]

    def final(self, measure: Measure) -> Spread:
        """Return a measure at the end of the runs. One that diverged counts as not known."""
        return Spread.of([measure(run.points[-1]) for run in self.runs if run.points])

    @property
    def diverged(self) -> int:
        """How many seeds ended without a finite perplexity."""
        return sum(not math.isfinite(run.points[-1].perplexity) for run in self.runs if run.points)

    def until(self, perplexity: float, measure: Measure) -> Spread:
        """Return what a measure was when the held-out perplexity first was that low."""
        return Spread.of([reached(run.points, perplexity, measure=measure) for run in self.runs])

    def curve(self, x: Measure, y: Measure) -> Curve:
        """Return y over x."""
        at_step: dict[int, list[Point]] = defaultdict(list)
        for run in self.runs:
            for point in run.points:
                at_step[point.step].append(point)
        ordered = [points for _, points in sorted(at_step.items())]
        xs = [statistics.fmean(x(point) for point in points) for points in ordered]
        return _curve(xs, [Spread.of([y(point) for point in points]) for points in ordered])

    def by_round(self, of: Callable[[MethodRun], Sequence[tuple[int, float]]]) -> Curve:
        """Return a measure over rounds; ``of`` gives the rounds and values of a run."""
        at_round: dict[int, list[float]] = defaultdict(list)
        for run in self.runs:
            for round_, value in of(run):
                at_round[round_].append(value)
        ordered = sorted(at_round.items())
        return _curve([float(r) for r, _ in ordered], [Spread.of(values) for _, values in ordered])

    @property
    def largest_error(self) -> float:
        """The largest aggregation error of any round and seed; NaN without rounds."""
        errors = [point.aggregation_error for run in self.runs for point in run.rounds]
        return Spread.of(errors).high

    @property
    def peak_memory_bytes(self) -> dict[str, float]:
        """Each device's peak, the largest over seeds."""
        peaks: dict[str, float] = {}
        for run in self.runs:
            for device, size in run.peak_memory_bytes.items():
                peaks[device] = max(size, peaks.get(device, 0.0))
        return peaks


def methods(comparison: Comparison, *kinds: Kind) -> list[Method]:
    """Return the methods of these kinds, `SUBJECT` first, the others as they were run."""
    runs: dict[str, list[MethodRun]] = defaultdict(list)
    for run in comparison.methods:
        if run.kind in kinds:
            runs[run.method].append(run)
    found = [Method(name, own[0].kind, tuple(own)) for name, own in runs.items()]
    return sorted(found, key=lambda method: method.name != SUBJECT)


def reached(points: Sequence[Point], perplexity: float, *, measure: Measure) -> float:
    """Return a measure when the perplexity first was as low as that; NaN where it never was.

    Between two evaluations, it is taken to lie on a straight line over log perplexity.
    """
    before: Point | None = None
    for point in points:
        if point.perplexity <= perplexity:
            if before is None:
                return float(measure(point))
            share = math.log(before.perplexity / perplexity)
            share /= math.log(before.perplexity / point.perplexity)
            return float(measure(before) + share * (measure(point) - measure(before)))
        if math.isfinite(point.perplexity):
            before = point
    return math.nan


def common_target(strategies: Sequence[Method]) -> float:
    """Return the lowest perplexity that every run of every strategy reached; NaN without runs.

    Runs that never had a finite one are left out, and so are strategies that did not learn: those
    which stayed above the geometric mean of where training began and where the best one ended.
    """
    began = Spread.of(
        [run.points[0].perplexity for m in strategies for run in m.runs if run.points]
    )
    lowest = {
        method.name: Spread.of(
            [Spread.of([point.perplexity for point in run.points]).low for run in method.runs]
        )
        for method in strategies
    }
    best = Spread.of([spread.low for spread in lowest.values()]).low
    learnt = [one.high for one in lowest.values() if one.high <= math.sqrt(began.high * best)]
    return max(learnt, default=math.nan)


def worth_seeing(curves: Sequence[Curve]) -> float | None:
    """Return the largest y to show: the highest that a curve has after a fifth of its points.

    The first steps fall so steeply that the rest would be a flat line.
    """
    late = [y for curve in curves for y in curve.high[max(1, len(curve.high) // 5) :]]
    known = np.array([y for y in late if math.isfinite(y)])
    return float(known.max()) * 1.05 if known.size else None


def _curve(xs: list[float], spreads: Sequence[Spread]) -> Curve:
    return Curve(
        xs,
        [one.mean for one in spreads],
        [one.low for one in spreads],
        [one.high for one in spreads],
    )
