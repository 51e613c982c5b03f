"""Plans change for a gain that lasts, rarely, and at once where a device is in need."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator.planning.device_plan import DevicePlan
from coordinator.planning.prediction import Prediction
from coordinator.planning.replanning import (
    History,
    Proposal,
    Standing,
    assumed,
    decide,
    switch_seconds,
)
from shared.protocol.messages import DeviceId

NANO, ORIN = DeviceId("nano"), DeviceId("orin")
PLAN = DevicePlan(
    split_layer=2, ranks={"a": 8}, scalings={"a": 2.0}, batch=4, micro_batch=2, in_flight=2
)
SMALLER = dataclasses.replace(PLAN, split_layer=1, ranks={"b": 4}, scalings={"b": 4.0})
MORE = dataclasses.replace(PLAN, batch=6)
RESTED = History(rounds_since_change=3, importance_change=0.0, steps_left=100)
TOO_SOON = dataclasses.replace(RESTED, rounds_since_change=2)


def standing(**changes):
    return Standing(**{"plan": PLAN, "assumed_slowdown": 1.0, "slowdown": 1.0, **changes})


def proposal(*, after_s=0.8, plans=None):
    return Proposal(
        plans=plans or {NANO: SMALLER, ORIN: MORE},
        prediction=Prediction(step_s=after_s, server_s=0.0, devices={}),
        current=Prediction(step_s=1.0, server_s=0.0, devices={}),
    )


def decision(proposed=None, history=RESTED, nano=None):
    both = {NANO: nano or standing(), ORIN: standing()}
    return decide(both, proposed or proposal(), history=history)


def test_a_gain_that_is_worth_it_changes_all_parts_together():
    found = decision()
    assert found.why == "gain"
    assert dict(found.plans) == {
        NANO: SMALLER,
        ORIN: dataclasses.replace(MORE, ranks=PLAN.ranks),
    }


def test_a_small_gain_is_none():
    assert not decision(proposal(after_s=0.951)).plans
    assert decision(proposal(after_s=0.949)).plans
    assert not decision(proposal(after_s=1.2)).plans


def test_a_change_must_pay_for_itself_in_the_steps_that_are_left():
    slow_to_switch = standing(switch_s=19.0)
    assert decision(nano=slow_to_switch).plans
    few = dataclasses.replace(RESTED, steps_left=90)
    assert not decision(nano=slow_to_switch, history=few).plans, "18 s for 19 s"


def test_parts_stay_for_three_aggregations():
    assert not decision(history=TOO_SOON).plans


def test_a_device_that_became_much_slower_is_not_made_to_wait():
    tired = standing(slowdown=3.0)
    found = decision(nano=tired, history=TOO_SOON)
    assert found.why == "slower"
    assert found.plans.keys() == {NANO, ORIN}, "others take what it gives up"
    assert not decision(nano=standing(slowdown=1.4), history=TOO_SOON).plans
    as_assumed = standing(slowdown=3.0, assumed_slowdown=3.0)
    assert not decision(nano=as_assumed, history=TOO_SOON).plans
    assert not decision(proposal(after_s=1.0), nano=tired, history=TOO_SOON).plans, "no help"


def test_a_device_that_lost_the_memory_it_needs_changes_at_any_price():
    poor = standing(memory_limit_bytes=100, needed_bytes=200, switch_s=1e6)
    found = decision(proposal(after_s=2.0), nano=poor, history=TOO_SOON)
    assert found.why == "memory"
    assert found.plans[NANO] == SMALLER
    enough = standing(memory_limit_bytes=200, needed_bytes=200)
    assert not decision(proposal(after_s=2.0), nano=enough, history=TOO_SOON).plans


def test_less_room_with_the_same_blocks_takes_the_ranks_that_fit():
    fewer = dataclasses.replace(PLAN, ranks={"a": 2})
    poor = standing(memory_limit_bytes=100, needed_bytes=200)
    found = decision(proposal(plans={NANO: fewer, ORIN: PLAN}), nano=poor)
    assert dict(found.plans) == {NANO: fewer}


def test_ranks_move_when_importance_has_and_not_before():
    moved = {NANO: dataclasses.replace(PLAN, ranks={"a": 16}), ORIN: PLAN}
    same = proposal(after_s=1.0, plans=moved)
    assert not decision(same, history=dataclasses.replace(RESTED, importance_change=0.1)).plans
    history = dataclasses.replace(RESTED, importance_change=0.11)
    found = decision(same, history=history)
    assert found.why == "importance"
    assert dict(found.plans) == {NANO: moved[NANO]}
    too_soon = dataclasses.replace(TOO_SOON, importance_change=0.9)
    assert not decision(same, history=too_soon).plans


def test_ranks_for_other_blocks_do_not_come_without_the_blocks():
    history = dataclasses.replace(RESTED, importance_change=0.5)
    assert not decision(proposal(after_s=1.0), history=history).plans


def test_a_device_that_is_not_in_the_proposal_stays_as_it_is():
    found = decision(proposal(plans={NANO: SMALLER}))
    assert found.plans.keys() == {NANO}


@pytest.mark.parametrize(
    ("before", "measured", "expected"),
    [(1.0, 1.1, 1.0), (1.0, 0.9, 1.0), (1.0, 1.2, 1.2), (3.0, 1.0, 1.0), (3.0, 2.8, 3.0)],
)
def test_what_differs_as_measurements_do_is_no_change(before, measured, expected):
    assert assumed(before, measured) == expected


def test_switching_takes_the_fetching_of_blocks_and_loading():
    costs = {"block_bytes": 100.0, "downlink_bytes_per_s": 50.0, "load_s": 3.0}
    more = dataclasses.replace(PLAN, split_layer=5)
    assert switch_seconds(PLAN, more, **costs) == 3 * 100 / 50 + 3
    assert switch_seconds(more, PLAN, **costs) == 3.0
    assert switch_seconds(PLAN, MORE, **costs) == 0.0
    unknown = {**costs, "downlink_bytes_per_s": None}
    assert switch_seconds(PLAN, more, **unknown) == 3.0
