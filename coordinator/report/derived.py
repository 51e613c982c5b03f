"""What follows from a run's records: times, durations, ranks, and which plans differ."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coordinator.report.records import Plan, Point, RunRecords

Floats = npt.NDArray[np.float64]

_BLOCK = re.compile(r"(?:^|.*?\.)(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """Time since the run's first line, in a unit that suits how long it took."""

    began_s: float
    unit_s: float
    label: str

    def of(self, time_s: float) -> float:
        """Return a time (seconds since 1970) on this axis."""
        return (time_s - self.began_s) / self.unit_s


def time_axis(records: RunRecords) -> TimeAxis:
    """Return the axis that all charts of a run share."""
    times = [point.time_s for points in records.metrics.values() for point in points]
    times += [plan.time for plan in records.plans]
    began_s = min(times, default=0.0)
    return axis_of(began_s, max(times, default=0.0))


def axis_of(began_s: float, ended_s: float) -> TimeAxis:
    """Return an axis for what lasts from ``began_s`` to ``ended_s``."""
    for unit_s, name in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if ended_s - began_s > 2 * unit_s:
            return TimeAxis(began_s, unit_s, name)
    return TimeAxis(began_s, 1.0, "seconds")


def by_round(points: Sequence[Point]) -> dict[int, float]:
    """Return the last finite value of each round."""
    return {point.round: point.value for point in points if math.isfinite(point.value)}


def step_durations(records: RunRecords) -> list[Point]:
    """Return the seconds of each step, from one step's line to the next of the same round.

    The first step of a round has none: hand-back and evaluation stand before it.
    """
    points = records.series("train/loss")
    return [
        Point(after.time_s, after.round, after.step, after.time_s - before.time_s)
        for before, after in itertools.pairwise(points)
        if before.round == after.round and before.step + 1 == after.step
    ]


def step_medians(records: RunRecords) -> list[Point]:
    """Return the seconds of a median step, one point in the middle of each round.

    Where steps were not timed one by one (devices that train alone), it is the round's
    seconds over its steps, which includes hand-back and evaluation.
    """
    by_round: dict[int, list[Point]] = defaultdict(list)
    for point in step_durations(records):
        by_round[point.round].append(point)
    medians = {}
    previous = 0
    for whole in records.series("round/seconds"):
        steps, previous = whole.step - previous, whole.step
        if steps > 0:
            middle = whole.step - steps // 2
            medians[whole.round] = Point(whole.time_s, whole.round, middle, whole.value / steps)
    for round_, points in by_round.items():
        middle_one = points[len(points) // 2]
        median = statistics.median(point.value for point in points)
        medians[round_] = Point(middle_one.time_s, round_, middle_one.step, median)
    return [medians[round_] for round_ in sorted(medians)]


def differing(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that changed what some device does, each with its first line.

    Of several lines after the same step the last counts: a resumed run plans once more.
    """
    latest = {plan.step: plan for plan in plans}
    changed: list[Plan] = []
    for _, plan in sorted(latest.items()):
        if not changed or _does(changed[-1]) != _does(plan):
            changed.append(plan)
    return changed


def _does(plan: Plan) -> object:
    return plan.server_ranks, {
        name: (one.split_layer, one.batch, one.micro_batch, one.in_flight, one.ranks)
        for name, one in plan.devices.items()
    }


def module_place(module: str) -> tuple[int, str] | None:
    """Return block number and kind of a module path: ``transformer.h.3.mlp.c_fc`` is 3, mlp.c_fc.

    None for a module outside the blocks.
    """
    found = _BLOCK.fullmatch(module)
    return (int(found[1]), found[2]) if found else None


@dataclass(frozen=True, slots=True)
class BlockMap:
    """One value for each module of a model: ``values_KB``, K kinds x B blocks; NaN: none."""

    kinds: Sequence[str]
    blocks: Sequence[int]
    values_KB: Floats


def block_map(values: Mapping[str, float], modules: Iterable[str]) -> BlockMap:
    """Arrange values by module path into the kinds x blocks of ``modules``.

    A module in no block is left out; one of ``modules`` without a value is NaN.
    """
    places = {module: place for module in modules if (place := module_place(module))}
    by_block = sorted(places.values(), key=lambda place: place[0])
    kinds = tuple(dict.fromkeys(kind for _, kind in by_block))
    blocks = tuple(sorted({block for block, _ in places.values()}))
    values_KB = np.full((len(kinds), len(blocks)), np.nan)
    for module, (block, kind) in places.items():
        values_KB[kinds.index(kind), blocks.index(block)] = values.get(module, np.nan)
    return BlockMap(kinds, blocks, values_KB)


def running_mean(values: Sequence[float], *, window: int) -> Floats:
    """Return the mean around each value, over ``window`` values or as many as there are."""
    weights = np.ones(min(window, len(values)))
    counts = np.convolve(np.ones(len(values)), weights, mode="same")
    return np.convolve(np.asarray(values, dtype=np.float64), weights, mode="same") / counts


def mean_ranks(plan: Plan) -> dict[str, float]:
    """Return each module's rank, the mean over those that hold a copy of it."""
    held: dict[str, list[int]] = defaultdict(list)
    for ranks in (*(one.ranks for one in plan.devices.values()), plan.server_ranks):
        for module, rank in ranks.items():
            held[module].append(rank)
    return {module: statistics.fmean(ranks) for module, ranks in held.items()}


def thinned(xs: Sequence[float], ys: Sequence[float], *, at_most: int) -> tuple[Floats, Floats]:
    """Return no more than ``at_most`` points: means of neighbours, that skip what is not finite."""
    x_N, y_N = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if len(x_N) <= at_most:
        return x_N, y_N
    pairs = [(_mean(x), _mean(y)) for x, y in _cut(x_N, y_N, pieces=at_most)]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])


def _cut(x_N: Floats, y_N: Floats, *, pieces: int) -> zip[tuple[Floats, Floats]]:
    return zip(np.array_split(x_N, pieces), np.array_split(y_N, pieces), strict=True)


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def held_out_measure(records: RunRecords) -> str:
    """Return what says how good held-out data came out: a classifier's accuracy, or perplexity."""
    return "accuracy" if records.series("eval/accuracy") else "perplexity"
