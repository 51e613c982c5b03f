"""What a step of any optimizer decides: each module's rate, the scale, and when there is none."""

from __future__ import annotations

import pytest

from shared.errors import NumericsError
from shared.optimizer_step import StepCounts, check_target_tokens, gradient_scale
from shared.terms import OptimizerTerms

TERMS = OptimizerTerms(learning_rate=1.0, schedule="constant", rewarm_steps=4)


def following(*names):
    counts = StepCounts(TERMS, total_steps=100)
    counts.follow(names, kept=())
    return counts


def test_what_is_fresh_at_the_runs_first_step_has_the_schedules_rate():
    counts = following("q")
    assert [counts.take(step) for step in range(3)] == [{"q": 1.0}] * 3


def test_what_is_fresh_later_climbs_and_what_is_kept_does_not_start_again():
    counts = following("q", "v")
    counts.take(0)
    counts.follow(["q", "v"], kept={"q"})
    assert [counts.take(step)["v"] for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    counts.follow(["q", "v"], kept={"v"})
    assert counts.take(6) == {"q": 0.25, "v": 1.0}


def test_modules_are_grouped_by_the_rates_that_are_before_them():
    counts = following("q", "k", "v")
    assert counts.groups() == (("q", "k", "v"),)
    counts.take(10)
    counts.follow(["q", "k", "v", "o"], kept={"q", "v"})
    assert counts.groups() == (("q", "v"), ("k", "o"))


def test_a_restored_module_goes_on_where_it_was():
    counts, again = following("q"), following("q")
    for step in (10, 11):
        counts.take(step)
    since_fresh, from_the_start = counts.of("q")
    again.restore("q", since_fresh=since_fresh, from_the_start=from_the_start)
    assert again.take(12) == counts.take(12) == {"q": 0.75}


@pytest.mark.parametrize(
    ("max_grad_norm", "scale"), [(0.0, 0.5), (10.0, 0.5), (1.0, 0.5 / 3.000001)]
)
def test_the_scale_divides_and_clips(max_grad_norm, scale):
    found = gradient_scale(6.0, denominator=2, step=0, max_grad_norm=max_grad_norm)
    assert found == (3.0, pytest.approx(scale, rel=1e-9))


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_an_error(norm):
    with pytest.raises(NumericsError, match=r"gradients of step 3 are not finite.*learning_rate"):
        gradient_scale(norm, denominator=2, step=3, max_grad_norm=1.0)


def test_a_step_wants_a_target_token():
    check_target_tokens(1, step=3)
    with pytest.raises(NumericsError, match="step 3 has no target tokens"):
        check_target_tokens(0, step=3)
