"""The search itself: exact on small fleets, near it on large ones, and no further than asked."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from coordinator.planning import allocation, exact_allocation, priced_allocation
from coordinator.planning.cost_book import CostBook
from coordinator.planning.exact_allocation import Table
from coordinator.planning.options import Options
from coordinator.planning.planner import plan_fleet
from coordinator.planning.possible_parts import PossibleParts
from coordinator.planning.server_room import ServerRoom
from coordinator.planning.time_search import Allocation, shortest_steps
from tests.support.fleets import Machine, conditions, device, llama

MODEL = llama(6)


def tables(random, count):
    return [
        Table(
            least=1,
            seconds_OY=random.uniform(0.5, 1.5, size=(3, 1)) * np.arange(1, 6),
            load_OY=random.uniform(0.1, 0.5, size=(3, 1)) * np.arange(1, 6),
        )
        for _ in range(count)
    ]


def best_by_trying(some, total, limit_s):
    choices = [list(itertools.product(range(3), range(1, 6))) for _ in some]
    loads = []
    for every in itertools.product(*choices):
        at = [(option, batch - 1) for option, batch in every]
        seconds = [table.seconds_OY[where] for table, where in zip(some, at, strict=True)]
        if sum(batch for _, batch in every) == total and max(seconds) <= limit_s:
            loads.append(sum(table.load_OY[w] for table, w in zip(some, at, strict=True)))
    return min(loads, default=None)


@pytest.mark.parametrize("limit_s", [1.5, 2.5, 4.0, math.inf])
def test_dynamic_programming_finds_the_least_load_there_is(limit_s):
    random = np.random.default_rng(1)
    for _ in range(10):
        some = tables(random, 3)
        found = exact_allocation.allocate(some, 7, limit_s)
        expected = best_by_trying(some, 7, limit_s)
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.server_s == pytest.approx(expected)
            assert found.longest_s <= limit_s
            assert sum(batch for _, batch in found.choices) == 7


def test_fewer_sequences_than_devices_cannot_be_placed():
    assert exact_allocation.allocate(tables(np.random.default_rng(0), 3), 2, math.inf) is None


def test_the_search_stops_at_the_best_trade_of_time_for_load():
    def allocate(limit_s):
        """A device may take x in [1, 4]; the server then has 4 / x to do."""
        if limit_s < 1:
            return None
        taken = min(limit_s, 4.0)
        return Allocation(taken, 4 / taken, ())

    found = shortest_steps(allocate, max, least_s=1.0, tolerance=0.001)[0]
    assert found.longest_s == pytest.approx(2.0, rel=0.001)
    total = shortest_steps(allocate, lambda a, b: a + b, least_s=1.0, tolerance=0.001)[0]
    assert total.longest_s + total.server_s == pytest.approx(4.0, rel=0.001)


def fleet(count, seed):
    random = np.random.default_rng(seed)
    return [
        device(
            f"d{index}",
            Machine(
                speed=10 ** random.uniform(-1.5, 0),
                uplink=10 ** random.uniform(5.5, 7.5),
                downlink=10 ** random.uniform(5.5, 7.5),
                memory_bytes=int(random.uniform(4e8, 9e8)),
            ),
            MODEL,
        )
        for index in range(count)
    ]


def estimated(options: list[Options], book, search):
    found = search(options)
    longest_s = server_s = 0.0
    for one, (option, batch) in zip(options, found, strict=True):
        table = allocation.table(one, book, most=batch)
        longest_s = max(longest_s, float(table.seconds_OY[option, -1]))
        server_s += float(table.load_OY[option, -1])
    return (longest_s**3 + server_s**3) ** (1 / 3)


@pytest.mark.parametrize("server", [2.0, 20.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_prices_come_near_the_exact_allocation_already_on_a_few_devices(server, seed):
    devices = fleet(20, seed)
    run = conditions(MODEL, server=Machine(speed=server))
    book = CostBook(devices, run)
    options = PossibleParts(book, run, ServerRoom(1, math.inf)).of(devices)

    def objective(longest_s, server_s):
        return (longest_s**3 + server_s**3) ** (1 / 3)

    def exact(some):
        return allocation._exact(allocation._tables(some, 80, book), 80, objective)[0].choices

    def priced(some):
        return allocation._priced(some, 80, objective)

    assert sum(batch for _, batch in priced(options)) == 80
    assert estimated(options, book, priced) <= 1.06 * estimated(options, book, exact)


def test_a_price_places_no_more_than_there_is_room_for():
    offers = priced_allocation.Offers(
        option_FO=np.array([[0], [0]]),
        step_FO=np.array([[1.0], [2.0]]),
        cycle_FO=np.array([[1.0], [2.0]]),
        load_FO=np.array([[0.1], [0.2]]),
        micro_batch_FO=np.array([[2.0], [2.0]]),
        least_F=np.array([1, 1]),
        most_F=np.array([16, 16]),
    )
    assert priced_allocation.allocate(offers, 9, 4.0) is not None
    tight = priced_allocation.allocate(offers, 12, 4.0)
    assert tight is not None
    assert [batch for _, batch in tight.choices] == [8, 4]
    assert priced_allocation.allocate(offers, 13, 4.0) is None
    assert priced_allocation.allocate(offers, 2, 1.5) is None, "the second has no time for one"
    fewest = priced_allocation.allocate(offers, 3, 4.0)
    assert fewest is not None
    assert [batch for _, batch in fewest.choices] == [2, 1], "where it loads the server least"


def test_a_large_fleet_is_planned_whole_and_those_who_cannot_are_named():
    devices = fleet(60, seed=3)
    devices[7] = device("d7", Machine(memory_bytes=200 * 2**20), MODEL)
    found = plan_fleet(devices, conditions(MODEL, server=Machine(speed=20.0)))
    assert set(found.refused) == {"d7"}
    assert sum(plan.batch for plan in found.plans.values()) == 4 * 59
    for one in devices:
        if one.device_id in found.plans:
            needed = found.prediction.devices[one.device_id].memory_bytes
            assert needed <= (one.memory_limit_bytes or 0)
