"""The learning rate: warm-up, fall, and the climb after a hand-back, as a function of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.schedule import learning_rate
from shared.terms import OptimizerTerms

PEAK = 0.1


def terms(**changes):
    return OptimizerTerms(**{"learning_rate": PEAK, "schedule": "linear", **changes})


def rates(total=10, **changes):
    return [learning_rate(terms(**changes), step, total_steps=total) for step in range(total)]


def test_a_constant_rate_is_the_peak_throughout():
    assert rates(schedule="constant") == [PEAK] * 10


def test_the_linear_schedule_falls_by_the_same_amount_each_step():
    assert rates() == pytest.approx([PEAK * (10 - step) / 10 for step in range(10)])


def test_the_cosine_schedule_is_half_way_down_in_the_middle():
    found = rates(schedule="cosine")
    assert found[0] == PEAK
    assert found[5] == pytest.approx(PEAK / 2)
    assert found[2] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi * 0.2)))


def test_the_warm_up_climbs_to_the_peak_and_its_first_step_already_learns():
    found = rates(warmup_steps=4)
    assert found[:4] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK])
    assert found[4] == PEAK, "the fall begins at the end of the warm-up"
    assert found[9] == pytest.approx(PEAK / 6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_ends_at_its_lowest_ratio_and_stays_there(schedule):
    low = terms(schedule=schedule, min_learning_rate_ratio=0.2)
    for step in (10, 11, 1000):
        assert learning_rate(low, step, total_steps=10) == pytest.approx(PEAK * 0.2)


def test_after_a_reset_of_the_moments_the_rate_climbs_again():
    def rate(since):
        return learning_rate(
            terms(schedule="constant", rewarm_steps=4), 50, total_steps=100, steps_since_reset=since
        )

    assert [rate(since) for since in range(6)] == pytest.approx(
        [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK, PEAK]
    )
    assert rate(None) == PEAK


def test_without_rewarm_steps_a_reset_changes_nothing():
    rate = learning_rate(terms(rewarm_steps=0), 3, total_steps=10, steps_since_reset=0)
    assert rate == learning_rate(terms(), 3, total_steps=10)


@given(
    step=st.integers(0, 200),
    total=st.integers(1, 150),
    since=st.none() | st.integers(0, 20),
    some=st.builds(
        terms,
        warmup_steps=st.integers(0, 160),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        min_learning_rate_ratio=st.floats(0, 1),
    ),
)
def test_a_rate_is_never_negative_nor_above_the_peak(step, total, since, some):
    found = learning_rate(some, step, total_steps=total, steps_since_reset=since)
    assert 0 <= found <= PEAK * (1 + 1e-12)
    if step < total:
        assert found > 0, "every step of a run learns"
