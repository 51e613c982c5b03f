"""A small fleet's allocation, made better by playing its steps through. Pure.

Two estimates stand behind an allocation: how long a device's step is (`Stages.step_s`), and how
much devices keep each other waiting (`contended_s`). Both are replaced by `step_simulation` where
it matters: the first wherever a choice comes up, the second for the best few neighbours of an
allocation, of which the fastest is the next allocation until none is faster.

Shape suffixes: A, B choices of one device and of another.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from coordinator.planning.cost_book import CostBook
from coordinator.planning.exact_allocation import Table
from coordinator.planning.options import Options, staged_choice
from coordinator.planning.prediction import simulated
from coordinator.planning.step_simulation import SimulatedDevice, step_seconds

Choice: TypeAlias = tuple[int, int]
"""An option of a device and its number of sequences."""
Choices: TypeAlias = tuple[Choice, ...]

Estimate: TypeAlias = Callable[[Any, Any], Any]
"""(longest step of a device, the server's work) → step of the fleet; also for arrays."""

SHORTLIST = 24
ROUNDS = 8
RANKINGS = 3
MOST_MICRO_BATCHES = 8_000
"""Micro-batches simulated in all: about a second's work."""
GAIN = 0.998
"""A neighbour must be faster than this times the time of what there is."""
MOST_MOVED = 2
"""Sequences that go from one device to another in one move."""
EXACT = 0.01
"""An estimate is right that is as near to the simulation."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surroundings:
    """What is the same for every allocation. ``tables`` are corrected as choices come up."""

    options: Sequence[Options]
    tables: Sequence[Table]
    book: CostBook
    others: Sequence[SimulatedDevice]
    server_optimizer_s: float
    open_micro_batches: int
    estimate: Estimate


class Refinement:
    """Remembers what was simulated."""

    def __init__(self, around: Surroundings) -> None:
        """Start with nothing simulated."""
        self._around = around
        self._left = MOST_MICRO_BATCHES
        self._steps_s: dict[Choices, float] = {}
        self._devices: dict[tuple[int, Choice], SimulatedDevice] = {}

    def correct(self, choices: Choices) -> bool:
        """Put simulated steps of single devices into the tables; tell whether that is news."""
        news = [self._correct(index, choice) for index, choice in enumerate(choices)]
        return any(news)

    def improved(self, starts: Sequence[Choices]) -> Choices:
        """Return the best of ``starts``, or one that is better still."""
        best = min(starts, key=self._step_s)
        for _ in range(ROUNDS):
            found = min(self._shortlist(best), key=self._step_s, default=best)
            if self._step_s(found) >= GAIN * self._step_s(best):
                break
            best = found
        return best

    def _shortlist(self, best: Choices) -> list[Choices]:
        """Return the best neighbours by estimates that were corrected for these very ones."""
        found: list[Choices] = []
        for _ in range(RANKINGS):
            ranked = heapq.nsmallest(SHORTLIST, _neighbours(best, self._around))
            found = [choices for _, choices in ranked]
            news = [self.correct(choices) for choices in found]
            if not any(news):
                break
        return found

    def _correct(self, index: int, choice: Choice) -> bool:
        key = index, choice
        if key in self._devices or self._left < 0:
            return False
        around, (option, batch) = self._around, choice
        device = _simulated(around.options[index], option, batch, book=around.book)
        self._devices[key] = device
        seconds_OY = around.tables[index].seconds_OY
        where = option, batch - around.tables[index].least
        before_s, seconds_OY[where] = seconds_OY[where], self._simulate([device])
        return bool(abs(seconds_OY[where] - before_s) > EXACT * before_s)

    def _step_s(self, choices: Choices) -> float:
        if choices not in self._steps_s:
            self.correct(choices)
            own = [self._devices.get(key) for key in enumerate(choices)]
            known = [device for device in own if device is not None]
            is_known = len(known) == len(own) and self._left > 0
            devices = [*known, *self._around.others]
            self._steps_s[choices] = self._simulate(devices) if is_known else float("inf")
        return self._steps_s[choices]

    def _simulate(self, devices: Sequence[SimulatedDevice]) -> float:
        self._left -= sum(device.micro_batches for device in devices)
        return step_seconds(
            devices,
            server_optimizer_s=self._around.server_optimizer_s,
            open_micro_batches=self._around.open_micro_batches,
        )


def _simulated(options: Options, option: int, batch: int, *, book: CostBook) -> SimulatedDevice:
    return simulated(
        staged_choice(options, option, batch, book=book),
        -(-batch // int(options.micro_batch_O[option])),
        in_flight=int(options.in_flight_O[option]),
        is_alone=bool(book.of(options.device).is_alone(options.split_layer_O[option])),
    )


# --- neighbours -------------------------------------------------------------------------------


def _neighbours(choices: Choices, around: Surroundings) -> Iterator[tuple[float, Choices]]:
    """Yield the best allocations in which one or two devices do otherwise, with estimates."""
    costs = [_cost(table, choice) for table, choice in zip(around.tables, choices, strict=True)]
    for one, other in itertools.permutations(range(len(choices)), 2):
        rest = [cost for index, cost in enumerate(costs) if index not in (one, other)]
        longest_s = max((seconds for seconds, _ in rest), default=0.0)
        server_s = sum(load for _, load in rest)
        for moved in range(MOST_MOVED + 1):
            batches = choices[one][1] - moved, choices[other][1] + moved
            fronts = [_front(around, *at) for at in zip((one, other), batches, strict=True)]
            for estimate, pair in _pairs(fronts, longest_s, server_s, around.estimate):
                changed = list(choices)
                changed[one], changed[other] = pair
                yield estimate, tuple(changed)


def _pairs(
    fronts: Sequence[_Front], longest_s: float, server_s: float, estimate: Estimate
) -> Iterable[tuple[float, tuple[Choice, Choice]]]:
    """Return the best pairs of choices of two devices, beside all the others."""
    first, second = fronts
    longest_AB = np.maximum(first.seconds[:, None], second.seconds)
    load_AB = first.load[:, None] + second.load + server_s
    step_AB = np.asarray(estimate(np.maximum(longest_AB, longest_s), load_AB)).ravel()
    best = np.argsort(step_AB, kind="stable")[:SHORTLIST]
    for place in best.tolist():
        a, b = divmod(place, len(second.seconds))
        yield float(step_AB[place]), (first.choices[a], second.choices[b])


@dataclass(frozen=True, slots=True, eq=False)
class _Front:
    """Choices of one device worth trying: what they take of it, and of the server."""

    choices: Sequence[Choice]
    seconds: npt.NDArray[np.float64]
    load: npt.NDArray[np.float64]


def _front(around: Surroundings, index: int, batch: int) -> _Front:
    """Return the choices that no other with as many micro-batches beats in time and load."""
    options, table = around.options[index], around.tables[index]
    column = batch - table.least
    if not 0 <= column < table.seconds_OY.shape[1]:
        return _Front((), np.empty(0), np.empty(0))
    seconds_O, load_O = table.seconds_OY[:, column], table.load_OY[:, column]
    count_O = -(-batch // options.micro_batch_O)
    order = np.lexsort((load_O, seconds_O, count_O))
    kept: list[int] = []
    lightest, count = np.inf, 0
    for option in order.tolist():
        if count_O[option] != count:
            lightest, count = np.inf, count_O[option]
        if load_O[option] < lightest:
            lightest = load_O[option]
            kept.append(option)
    return _Front([(option, batch) for option in kept], seconds_O[kept], load_O[kept])


def _cost(table: Table, choice: Choice) -> tuple[float, float]:
    option, batch = choice
    where = option, batch - table.least
    return float(table.seconds_OY[where]), float(table.load_OY[where])
