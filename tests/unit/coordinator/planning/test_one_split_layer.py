"""One split layer for all: the best of those that most devices can carry."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator.planning.planner import plan_fleet
from coordinator.planning.prediction import predict
from shared.errors import PlanError
from shared.protocol.messages import DeviceId
from tests.support.fleets import Machine, conditions, device, llama

MODEL = llama(8)
MACHINES = {
    "fast": Machine(speed=1.0),
    "slow": Machine(speed=0.25, uplink=2e6, downlink=2e6),
    "far": Machine(speed=0.5, uplink=5e5, downlink=2e6, round_trip_s=0.1),
}


def run(**changes):
    server = Machine(speed=changes.pop("server_speed", 2.0))
    settings = {
        "one_split_layer": True, "balance_batches": False, "ranks": "uniform", "most_blocks": 7
    }  # fmt: skip
    return conditions(MODEL, server=server, **{**settings, **changes})


def fleet(**machines):
    return [device(name, machine, MODEL) for name, machine in {**MACHINES, **machines}.items()]


def split_layers(found):
    return {plan.split_layer for plan in found.plans.values()}


def with_split_layer(one, k):
    return dataclasses.replace(one, terms=dataclasses.replace(one.terms, split_layer=k))


@pytest.mark.parametrize("server_speed", [0.5, 2.0, 20.0])
def test_it_is_the_one_with_the_shortest_step(server_speed):
    found = plan_fleet(fleet(), run(server_speed=server_speed))
    conditions_ = run(server_speed=server_speed, one_split_layer=False)
    steps = {}
    for k in range(1, 8):
        devices = [with_split_layer(one, k) for one in fleet()]
        steps[k] = plan_fleet(devices, conditions_).predicted_step_s
    (k,) = split_layers(found)
    assert steps[k] == min(steps.values())
    assert found.predicted_step_s == pytest.approx(steps[k])


def test_it_depends_on_the_server():
    few = plan_fleet(fleet(), run(server_speed=20.0))
    many = plan_fleet(fleet(), run(server_speed=0.1))
    assert min(split_layers(few)) < min(split_layers(many))


def needs(machine, k):
    """Return the bytes that a device needs at split layer ``k``."""
    one = with_split_layer(device("any", machine, MODEL), k)
    plans = plan_fleet([one], run(one_split_layer=False)).plans
    return predict(plans, [one], run()).devices[DeviceId("any")].memory_bytes


def test_all_get_what_the_smallest_can_carry():
    limit = int(needs(MACHINES["fast"], 3))
    small = dataclasses.replace(MACHINES["fast"], memory_bytes=limit)
    (free,) = split_layers(plan_fleet(fleet(), run(server_speed=0.1)))
    found = plan_fleet(fleet(small=small), run(server_speed=0.1))
    assert not found.refused
    (k,) = split_layers(found)
    assert k < free
    assert found.prediction.devices[DeviceId("small")].memory_bytes <= limit


def test_nobody_is_left_out_for_a_shorter_step_and_who_fits_nowhere_is_named():
    tiny = dataclasses.replace(MACHINES["fast"], memory_bytes=2**20)
    found = plan_fleet(fleet(tiny=tiny), run())
    assert set(found.refused) == {DeviceId("tiny")}
    assert "tiny may use 1 MiB, but" in found.refused[DeviceId("tiny")]
    assert len(split_layers(found)) == 1
    with pytest.raises(PlanError, match="no device can take part: only may use 1 MiB"):
        plan_fleet([device("only", tiny, MODEL)], run())


def test_who_comes_later_takes_what_the_others_have():
    pinned = [dataclasses.replace(one, pinned=plan_of(one, 5)) for one in fleet()]
    late = device("late", Machine(speed=0.1), MODEL)
    found = plan_fleet([*pinned, late], run())
    assert split_layers(found) == {5}
    small = dataclasses.replace(late, declared_limit_bytes=int(needs(Machine(speed=0.1), 2)))
    refused = plan_fleet([*pinned, small], run()).refused
    assert "the 5 blocks" in refused[DeviceId("late")]


def plan_of(one, k):
    return plan_fleet([with_split_layer(one, k)], run(one_split_layer=False)).plans[one.device_id]


def test_who_measured_nothing_gets_the_same():
    unmeasured = dataclasses.replace(device("old", Machine(), MODEL), measurements=None, data=None)
    found = plan_fleet([*fleet(), unmeasured], run())
    assert DeviceId("old") in found.plans
    assert len(split_layers(found)) == 1


def test_ranks_that_are_averaged_are_never_made_smaller_for_one_device():
    small = device("small", MACHINES["fast"], MODEL)
    small = dataclasses.replace(
        small, terms=dataclasses.replace(small.terms, micro_batch=1, micro_batch_is_stated=True)
    )
    enough = int(predict_bytes(small))
    tight = dataclasses.replace(small, declared_limit_bytes=enough - 1)
    shrunk = plan_fleet([tight], run()).plans[DeviceId("small")]
    assert set(shrunk.ranks.values()) == {4}
    with pytest.raises(PlanError, match="no device can take part: small may use"):
        plan_fleet([tight], run(hand_back="average"))


def predict_bytes(one):
    """Return what the device needs with one block, one sequence at a time and all of its rank."""
    terms = dataclasses.replace(one.terms, split_layer=1, in_flight=1)
    stated = dataclasses.replace(one, terms=terms)
    plans = plan_fleet([stated], run(one_split_layer=False)).plans
    return predict(plans, [stated], run()).devices[one.device_id].memory_bytes
