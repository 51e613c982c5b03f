"""Which of its options each device takes, and how many sequences: the shortest step. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from coordinator.planning import exact_allocation, priced_allocation
from coordinator.planning.cost_book import CostBook
from coordinator.planning.cost_model import contended_s
from coordinator.planning.exact_allocation import Table
from coordinator.planning.options import Options, table
from coordinator.planning.priced_allocation import Offers
from coordinator.planning.refinement import Choice, Refinement, Surroundings
from coordinator.planning.step_simulation import SimulatedDevice
from coordinator.planning.time_search import Allocation, Objective, shortest_steps

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = "npt.NDArray[Any] | float"

MOST_EXACT = 24
"""Devices up to which the allocation is exact; beyond that it is by prices."""

MOST_REFINED = 80
"""Micro-batches in a step up to which the allocation is refined by simulation."""

MOST_STARTS = 12
"""Allocations of each search that the refinement begins with."""
CORRECTIONS = 4
"""Searches more, as estimates are replaced by simulated steps."""

EXACT_TOLERANCE = 0.001
PRICED_TOLERANCE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is there already: devices that keep their parts, and the server's optimizer."""

    devices: Sequence[SimulatedDevice]
    longest_s: float
    server_s: float
    server_optimizer_s: float
    open_micro_batches: int


def best_choices(
    options: Sequence[Options], total: int, *, book: CostBook, load: Load
) -> tuple[Choice, ...]:
    """Return option and sequences of each device, ``total`` in all, for the shortest step.

    As near to ``total`` as the devices' least and most allow.
    """
    least, most = sum(one.least for one in options), sum(one.most for one in options)
    total = min(max(total, least), most)
    devices = len(options) + len(load.devices)

    def estimate(longest_s: Numbers, server_s: Numbers) -> Numbers:
        longest_s = np.maximum(longest_s, load.longest_s)
        server_s = server_s + (load.server_s + load.server_optimizer_s)
        return contended_s(longest_s, server_s, devices=devices)

    def objective(longest_s: float, server_s: float) -> float:
        return float(estimate(longest_s, server_s))

    if len(options) > MOST_EXACT:
        return _priced(options, total, objective)
    around = Surroundings(
        options=options,
        tables=_tables(options, total, book),
        book=book,
        others=load.devices,
        server_optimizer_s=load.server_optimizer_s,
        open_micro_batches=load.open_micro_batches,
        estimate=estimate,
    )
    return _refined(around, total, objective)


def _refined(around: Surroundings, total: int, objective: Objective) -> tuple[Choice, ...]:
    """Allocate by estimates, until the steps of those chosen are no longer estimates."""
    found = _exact(around.tables, total, objective)
    if sum(_micro_batches(around.options, found[0].choices)) > MOST_REFINED:
        return found[0].choices
    refinement = Refinement(around)
    starts = [one.choices for one in found[:MOST_STARTS]]
    for _ in range(CORRECTIONS):
        if not refinement.correct(found[0].choices):
            break
        found = _exact(around.tables, total, objective)
        starts += [one.choices for one in found[:MOST_STARTS]]
    return refinement.improved(starts)


def _tables(options: Sequence[Options], total: int, book: CostBook) -> list[Table]:
    spare = total - sum(one.least for one in options)
    return [table(one, book, most=one.least + spare) for one in options]


def _exact(tables: Sequence[Table], total: int, objective: Objective) -> list[Allocation]:
    return shortest_steps(
        lambda limit_s: exact_allocation.allocate(tables, total, limit_s),
        objective,
        least_s=max(float(one.seconds_OY.min()) for one in tables),
        tolerance=EXACT_TOLERANCE,
    )


def _micro_batches(options: Sequence[Options], choices: Sequence[Choice]) -> Iterable[int]:
    for one, (option, batch) in zip(options, choices, strict=True):
        yield -(-batch // int(one.micro_batch_O[option]))


def _priced(options: Sequence[Options], total: int, objective: Objective) -> tuple[Choice, ...]:
    offers = _offers(options)
    found = shortest_steps(
        lambda limit_s: priced_allocation.allocate(offers, total, limit_s),
        objective,
        least_s=float(offers.step_FO.min(axis=1).max()),
        tolerance=PRICED_TOLERANCE,
    )
    return found[0].choices


def _offers(options: Sequence[Options]) -> Offers:
    widest = max(len(one.step_O) for one in options)
    loads = [one.load_O / one.micro_batch_O for one in options]
    orders = [np.argsort(load_O, kind="stable") for load_O in loads]

    def sorted_(columns: Iterable[npt.NDArray[Any]], nothing: float) -> Array:
        found = np.full((len(options), widest), nothing)
        for row, own, order in zip(found, columns, orders, strict=True):
            row[: len(own)] = own[order]
        return found

    return Offers(
        option_FO=sorted_((np.arange(len(load_O)) for load_O in loads), 0).astype(np.int64),
        step_FO=sorted_((one.step_O for one in options), np.inf),
        cycle_FO=sorted_((one.cycle_O for one in options), 1.0),
        load_FO=sorted_(loads, np.inf),
        micro_batch_FO=sorted_((one.micro_batch_O for one in options), 1.0),
        least_F=np.array([one.least for one in options]),
        most_F=np.array([one.most for one in options]),
    )
