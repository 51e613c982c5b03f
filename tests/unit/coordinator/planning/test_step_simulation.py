"""A step played through: known answers, and what makes fleets slower than their devices."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from coordinator.planning.cost_model import Stages, contended_s
from coordinator.planning.step_simulation import Exchange, SimulatedDevice, step_seconds


def device(**changes):
    plain = {
        "micro_batches": 1,
        "in_flight": 2,
        "compute": (1.0, 2.0),
        "exchanges": (Exchange(up=0.5, server=0.25, down=0.25),),
        "latency_s": 0.0,
        "optimizer_s": 0.0,
    }
    return SimulatedDevice(**{**plain, **changes})


def pace(*devices, optimizer_s=0.0, open_micro_batches=16):
    return step_seconds(
        devices, server_optimizer_s=optimizer_s, open_micro_batches=open_micro_batches
    )


def test_one_micro_batch_alone_takes_the_sum_of_its_stages():
    assert pace(device()) == pytest.approx(4.0)
    assert pace(device(latency_s=0.1, optimizer_s=0.5)) == pytest.approx(4.7)


def test_a_device_that_exchanges_nothing_computes_and_no_more():
    alone = device(compute=(3.0,), exchanges=(), micro_batches=4, optimizer_s=1.0)
    assert pace(alone) == 13.0
    assert pace(alone, device()) == 13.0, "and nobody waits for it"


def test_while_one_micro_batch_is_away_the_next_is_computed():
    one_by_one = device(micro_batches=4, in_flight=1)
    assert pace(one_by_one) == pytest.approx(4 * 4.0)
    overlapping = device(micro_batches=4, in_flight=2)
    assert pace(overlapping) == pytest.approx(4 * 3.0), "its own computing is all that is left"


def test_each_way_of_a_link_carries_one_message_at_a_time():
    slow = device(
        micro_batches=4, in_flight=4, compute=(0.1, 0.1),
        exchanges=(Exchange(up=3.0, server=0.0, down=0.0),),
    )  # fmt: skip
    assert pace(slow) == pytest.approx(0.1 + 4 * 3.0 + 0.1)


def test_the_server_does_one_thing_at_a_time():
    busy = device(compute=(0.1, 0.1), exchanges=(Exchange(up=0.0, server=2.0, down=0.0),))
    assert pace(*[busy] * 5) == pytest.approx(10.0, rel=0.05)
    assert pace(*[busy] * 5, optimizer_s=1.0) == pytest.approx(11.0, rel=0.05)


def test_a_fast_device_waits_for_the_slowest_and_does_not_slow_it():
    fast, slow = device(compute=(0.1, 0.1)), device(compute=(10.0, 10.0))
    assert pace(fast, slow) == pytest.approx(pace(slow))


def test_two_that_meet_at_the_server_find_a_time_that_suits_both_if_there_is_one():
    short = device(exchanges=(Exchange(up=0.5, server=1.0, down=0.25),))
    assert pace(short, short) == pytest.approx(pace(short)), "one comes later, for good"
    long = device(micro_batches=3, exchanges=(Exchange(up=0.5, server=2.0, down=0.25),))
    assert pace(long, long) > 1.1 * max(pace(long), 2 * 3 * 2.0)


def test_no_more_micro_batches_are_open_at_the_server_than_may_be():
    labels_here = {
        "compute": (0.1, 1.0, 0.1),
        "exchanges": (Exchange(up=0.1, server=0.1, down=0.1),) * 2,
    }
    fleet = [device(**labels_here) for _ in range(4)]
    assert pace(*fleet, open_micro_batches=1) > pace(*fleet) + 2.0


def stages(one):
    return Stages(
        compute=one.compute,
        up=tuple(exchange.up for exchange in one.exchanges),
        server=tuple(exchange.server for exchange in one.exchanges),
        down=tuple(exchange.down for exchange in one.exchanges),
        latency_s=one.latency_s,
        optimizer_s=one.optimizer_s,
    )


def random_device(random):
    per_block, link, server = 10 ** random.uniform(-1, 0.5, size=3)
    exchanges = int(random.integers(1, 3))
    moved = {"up": link / 5, "down": link / 8}
    return device(
        micro_batches=int(random.integers(1, 8)),
        in_flight=int(random.integers(1, 4)),
        compute=tuple(per_block * share for share in (1.0, 0.4, 2.0)[: exchanges + 1]),
        exchanges=(Exchange(server=server / 10, **moved),) * exchanges,
        latency_s=0.01,
        optimizer_s=0.05,
    )


def test_the_closed_form_of_one_device_is_near_the_simulation():
    random = np.random.default_rng(0)
    devices = [random_device(random) for _ in range(300)]
    ratios = [
        float(stages(one).step_s(one.micro_batches, one.in_flight)) / pace(one) for one in devices
    ]
    assert statistics.median(ratios) == pytest.approx(1.0, abs=0.02)
    assert 0.9 < np.quantile(ratios, 0.05) <= np.quantile(ratios, 0.95) < 1.1


def test_the_estimate_for_fleets_is_nearer_to_the_simulation_than_the_bounds_it_joins():
    random = np.random.default_rng(0)
    bound, estimate = [], []
    for _ in range(200):
        fleet = [random_device(random) for _ in range(int(random.integers(2, 6)))]
        own_s = [float(stages(one).step_s(one.micro_batches, one.in_flight)) for one in fleet]
        # All finish together, as in a planned fleet, and the server has about as much to do.
        fleet = [scaled(one, 1.0 / seconds) for one, seconds in zip(fleet, own_s, strict=True)]
        server_s = sum(
            one.micro_batches * sum(exchange.server for exchange in one.exchanges) for one in fleet
        )
        if not 0.6 < server_s < 1.4:
            continue
        true_s = pace(*fleet)
        bound.append(max(1.0, server_s) / true_s)
        estimate.append(contended_s(1.0, server_s, devices=len(fleet)) / true_s)
    assert len(estimate) > 15
    assert statistics.median(estimate) == pytest.approx(1.0, abs=0.1)
    assert statistics.median(bound) < 0.95


def scaled(one, factor):
    exchanges = (
        Exchange(up=each.up * factor, server=each.server * factor, down=each.down * factor)
        for each in one.exchanges
    )
    return device(
        micro_batches=one.micro_batches,
        in_flight=one.in_flight,
        compute=tuple(seconds * factor for seconds in one.compute),
        exchanges=tuple(exchanges),
        latency_s=one.latency_s * factor,
        optimizer_s=one.optimizer_s * factor,
    )
