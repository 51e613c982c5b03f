"""How often something is repeated, by a clock that the work itself moves."""

from __future__ import annotations

import pytest

from shared.repeats import LEAST_REPEATS, MOST_REPEATS, TimeBudget, repeat, stopwatch
from tests.support.fake_clock import FakeClock


class Work:
    """Takes the seconds that it is told, the last of them for ever."""

    def __init__(self, clock: FakeClock, *seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds
        self.calls = 0

    def __call__(self, number: int) -> tuple[float, ...]:
        assert number == self.calls
        taken_s = self.seconds[min(number, len(self.seconds) - 1)]
        self.calls += 1
        self.clock.advance(taken_s)
        return taken_s, 2 * taken_s


def test_the_first_call_warms_up_and_is_left_out():
    clock = FakeClock()
    work = Work(clock, 1.0, 0.1)
    first, second = repeat(work, budget_s=2.0, clock=clock)
    assert first.seconds == pytest.approx(0.1)
    assert second.seconds == pytest.approx(0.2)
    assert first.spread == pytest.approx(0.0)


def test_quick_work_is_repeated_a_bounded_number_of_times():
    clock = FakeClock()
    work = Work(clock, 1e-6)
    repeat(work, budget_s=1e9, clock=clock)
    assert work.calls == 1 + MOST_REPEATS


def test_the_budget_is_overdrawn_for_the_least_number_of_repeats_only():
    clock = FakeClock()
    work = Work(clock, 1.0)
    repeat(work, budget_s=2.5, clock=clock)
    assert work.calls == 1 + LEAST_REPEATS
    work = Work(clock, 1.0)
    repeat(work, budget_s=1.2, clock=clock)
    assert work.calls == 3  # at twice the budget even these are too many


def test_a_call_that_takes_all_of_the_budget_is_what_there_is():
    clock = FakeClock()
    work = Work(clock, 30.0)
    timing, _ = repeat(work, budget_s=2.0, clock=clock)
    assert (work.calls, timing.seconds, timing.spread) == (1, 30.0, 0.0)


def test_the_median_ignores_an_outlier_and_the_spread_shows_it():
    clock = FakeClock()
    work = Work(clock, 0.1, 0.1, 5.0, 0.1)
    timing, _ = repeat(work, budget_s=6.0, clock=clock)
    assert timing.seconds == pytest.approx(0.1)
    assert timing.spread == pytest.approx(49.0)


def test_work_too_quick_for_the_clock_still_takes_time():
    clock = FakeClock()
    timing, _ = repeat(Work(clock, 0.0), budget_s=1.0, clock=clock)
    assert timing.seconds > 0


def test_what_one_part_leaves_of_the_time_the_later_ones_have():
    clock = FakeClock()
    budget = TimeBudget(10.0, parts=5, clock=clock)
    assert budget.next_s() == pytest.approx(2.0)
    clock.advance(0.4)
    assert budget.next_s() == pytest.approx(2.4)
    clock.advance(20.0)
    assert budget.left_s == budget.next_s() == 0.0


def test_a_stopwatch_tells_what_passed():
    clock = FakeClock()
    assert stopwatch(lambda: clock.advance(3.0), clock) == pytest.approx(3.0)
