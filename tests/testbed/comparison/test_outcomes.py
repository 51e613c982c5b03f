"""Means, targets and times that the page tells, on figures small enough to check by hand."""

from __future__ import annotations

import math

import pytest

from tests.support.comparisons import points, run
from tests.testbed.comparison.outcomes import (
    BYTES,
    PERPLEXITY,
    SECONDS,
    STEPS,
    Method,
    Spread,
    common_target,
    methods,
    reached,
    worth_seeing,
)
from tests.testbed.comparison.results import Comparison

NAN = math.nan


def method(*runs):
    return Method(runs[0].method, runs[0].kind, runs)


def test_a_perplexity_is_reached_between_two_evaluations():
    """From 100 to 1 over steps 10 to 20, 10 is half the way: the line is one over log."""
    curve = points(1000.0, 100.0, 1.0)
    assert reached(curve, 10.0, measure=STEPS) == pytest.approx(15.0)
    assert reached(curve, 10.0, measure=SECONDS) == pytest.approx(30.0)
    assert reached(curve, 10.0, measure=BYTES) == pytest.approx(1500.0)
    assert reached(curve, 100.0, measure=STEPS) == 10.0
    assert reached(curve, 2000.0, measure=STEPS) == 0.0


def test_the_first_time_counts_whatever_comes_later():
    assert reached(points(100, 10, 50, 10), 10.0, measure=STEPS) == 10.0


def test_what_was_never_reached_has_no_time():
    assert math.isnan(reached(points(100, 20), 10.0, measure=STEPS))
    assert math.isnan(reached((), 10.0, measure=STEPS))


def test_an_evaluation_that_was_not_finite_is_passed_over():
    assert reached(points(100, NAN, 1), 10.0, measure=STEPS) == pytest.approx(10.0)
    assert math.isnan(reached(points(100, NAN, NAN), 10.0, measure=STEPS))


def test_a_spread_is_of_the_seeds_that_have_a_figure():
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, 1.0, 6.0, 3)
    assert Spread.of([1.0, NAN]) == Spread(1.0, 1.0, 1.0, 1)
    assert Spread.of([]).count == 0


def test_a_curve_is_the_mean_over_seeds_step_by_step():
    two = method(run("m", 100, 10), run("m", 200, 30, seed=1, step_s=4.0))
    curve = two.curve(SECONDS, PERPLEXITY)
    assert curve.xs == [0.0, 30.0]
    assert (curve.ys, curve.low, curve.high) == ([150.0, 20.0], [100, 10], [200, 30])


def test_a_seed_that_ended_early_leaves_the_rest_of_the_curve_to_the_others():
    two = method(run("m", 100, 10, 8), run("m", 200, seed=1))
    assert two.curve(STEPS, PERPLEXITY).ys == [150.0, 10.0, 8.0]


def test_the_largest_error_and_memory_are_of_any_round_and_seed():
    two = method(run("m", 9, errors=(0.1, 0.3)), run("m", 9, seed=1, errors=(0.2,)))
    assert two.largest_error == 0.3
    assert two.peak_memory_bytes == {"nano": 101.0}
    assert math.isnan(method(run("m", 9)).largest_error)
    errors = two.by_round(lambda one: [(p.round, p.aggregation_error) for p in one.rounds])
    assert errors.xs == [1.0, 2.0]
    assert errors.ys == pytest.approx([0.15, 0.3])


def test_who_diverged_is_counted():
    two = method(run("m", 100, 10), run("m", 100, NAN, seed=1))
    assert two.diverged == 1
    assert two.final(PERPLEXITY) == Spread(10.0, 10.0, 10.0, 1)


def test_what_is_compared_comes_first_and_kinds_stay_apart():
    all_ = Comparison(
        settings={},
        methods=(run("b", 9), run("cenlora", 9, kind="reference"), run("hsplitlora", 9),
                 run("b", 9, seed=1)),
    )  # fmt: skip
    found = methods(all_, "strategy")
    assert [(one.name, len(one.runs)) for one in found] == [("hsplitlora", 1), ("b", 2)]
    assert [one.name for one in methods(all_, "reference")] == ["cenlora"]


def test_the_common_target_is_what_every_seed_of_every_strategy_reached():
    some = [
        method(run("a", 200, 9, 8), run("a", 200, 9, 8.5, seed=1)),
        method(run("b", 200, 12, 12.5)),
    ]
    assert common_target(some) == 12
    for one in some:
        assert one.until(12, SECONDS).count == len(one.runs)


def test_a_strategy_that_did_not_learn_does_not_set_the_target():
    """Geometric mean of 200 and 8: 40."""
    some = [method(run("a", 200, 9, 8)), method(run("b", 200, 150, 41))]
    assert common_target(some) == 8
    assert common_target([*some, method(run("c", 200, 150, 39))]) == 39
    assert math.isnan(common_target([]))


def test_a_chart_leaves_out_how_steeply_it_began():
    curve = method(run("m", 200, 50, 20, 15, 12, 11, 10, 9, 8, 8)).curve(STEPS, PERPLEXITY)
    assert worth_seeing([curve]) == pytest.approx(20 * 1.05)
    assert worth_seeing([]) is None
