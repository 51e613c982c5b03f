"""How long a round waits for a device, from what its plan predicts."""

from __future__ import annotations

import pytest

from coordinator.deadlines import MOST_TIMEOUTS, allowance
from coordinator.planning.device_plan import DevicePlan
from coordinator.rounds import Allowance
from coordinator.settings import DeviceRules

RULES = DeviceRules(step_timeout_s=100.0, late_factor=4.0, late_after_s=25.0)
LEAST_S = RULES.late_after_s
MOST_S = 1000.0
PLAN = DevicePlan(split_layer=2, batch=8, micro_batch=4, in_flight=2, ranks={}, scalings={})


def allowed(predicted_s, *, steps=5, probe_sequences=0, evaluation_sequences=0, **more):
    return allowance(
        PLAN,
        predicted_s=predicted_s,
        evaluation_sequences=evaluation_sequences,
        steps=steps,
        probe_sequences=probe_sequences,
        rules=RULES,
        **more,
    )


def test_a_step_may_take_several_times_as_long_as_was_predicted():
    assert allowed(20.0) == Allowance(
        quiet_s=100.0, evaluate_s=LEAST_S, first_step_s=80.0, step_s=80.0, alone_s=400.0
    )


def test_what_is_probed_before_the_first_step_comes_on_top():
    found = allowed(20.0, probe_sequences=16)
    assert found.first_step_s == 80.0 * 3
    assert found.alone_s == 80.0 * (3 + 4)


def test_what_is_probed_is_part_of_the_evaluation_that_it_is_handed_in_with():
    assert allowed(20.0, probe_sequences=16).evaluate_s == 80.0 * 2
    assert allowed(20.0, probe_sequences=16, evaluation_sequences=8).evaluate_s == 80.0 * 3


def test_a_quick_device_has_time_to_get_going():
    assert allowed(0.01).step_s == LEAST_S


@pytest.mark.parametrize("predicted_s", [None, 1e9])
def test_without_a_prediction_or_with_an_absurd_one_there_is_an_end_too(predicted_s):
    assert MOST_TIMEOUTS * RULES.step_timeout_s == MOST_S
    found = allowed(predicted_s, probe_sequences=16)
    assert (found.first_step_s, found.step_s, found.alone_s) == (MOST_S, MOST_S, 5 * MOST_S)


def test_an_evaluation_has_time_for_each_of_its_sequences():
    assert allowed(20.0, evaluation_sequences=40).evaluate_s == 80.0 * 5
    assert allowed(20.0, evaluation_sequences=10**9).evaluate_s == MOST_S
    assert allowed(None, evaluation_sequences=1).evaluate_s == MOST_S


def test_a_large_hand_back_over_a_slow_link_has_its_time_and_so_has_what_comes_back():
    found = allowed(0.01, carried_s=(50.0, 20.0))
    assert found.evaluate_s == LEAST_S + 4 * 50.0
    assert (found.first_step_s, found.step_s, found.hand_in_s) == (LEAST_S, LEAST_S, 4 * 20.0)
    assert found.alone_s == 5 * LEAST_S + 4 * 20.0


@pytest.mark.parametrize("predicted_s", [None, 0.01])
def test_nor_may_a_link_that_is_said_to_be_slow_keep_anybody_for_ever(predicted_s):
    found = allowed(predicted_s, carried_s=(1e9, 1e9))
    assert found.evaluate_s == found.step_s + found.hand_in_s == MOST_S
