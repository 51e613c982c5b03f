"""What is nobody's silence: what the owner slept through, and what it could not hear."""

from __future__ import annotations

import pytest

from coordinator.attention import (
    DOUBT_AFTER_S,
    DOUBT_UNTIL_S,
    LONGEST_GAP_S,
    TICK_S,
    AttendedClock,
    Watch,
)
from tests.support.fake_clock import FakeClock


def test_while_somebody_looks_it_goes_as_any_clock():
    clock = FakeClock()
    attended = AttendedClock(clock)
    for _ in range(10):
        clock.advance(0.7)
        attended.look()
    assert attended.monotonic_s() == pytest.approx(clock.monotonic_s())
    assert attended.wall_s() == clock.wall_s()


def test_of_a_long_gap_it_counts_the_beginning_only():
    clock = FakeClock()
    attended = AttendedClock(clock)
    began_s = attended.monotonic_s()
    clock.advance(500.0)
    assert attended.monotonic_s() - began_s == LONGEST_GAP_S
    attended.look()
    assert attended.monotonic_s() - began_s == LONGEST_GAP_S
    clock.advance(1.0)
    assert attended.monotonic_s() - began_s == LONGEST_GAP_S + 1.0


def test_it_never_goes_back():
    clock = FakeClock()
    attended = AttendedClock(clock)
    seen = []
    for step, seconds in enumerate([0.0, 3.0, 0.5, 2.0, 100.0, 0.1, 0.0, 2.1]):
        clock.advance(seconds)
        if step % 3:
            attended.look()
        seen.append(attended.monotonic_s())
    assert seen == sorted(seen)


def counted(watch, clock, seconds, *, arriving=False):
    """Let time pass in quarters of a second; return how much of it counted."""
    total_s = 0.0
    for _ in range(4 * seconds):
        clock.advance(0.25)
        if arriving:
            watch.arrived()
        total_s += watch.passed_s() or 0.0
    return total_s


def test_a_watch_looks_once_a_tick():
    clock = FakeClock()
    watch = Watch(clock)
    assert watch.idle_s == TICK_S
    clock.advance(TICK_S - 0.25)
    assert watch.passed_s() is None
    clock.advance(0.5)
    assert watch.passed_s() == TICK_S + 0.25
    assert watch.idle_s == TICK_S


def test_all_time_counts_while_something_arrives():
    clock = FakeClock()
    assert counted(Watch(clock), clock, 100, arriving=True) == 100


def test_where_nothing_arrives_our_own_link_is_suspected_for_a_while():
    clock = FakeClock()
    watch = Watch(clock)
    heard_s = counted(watch, clock, 100)
    assert heard_s == pytest.approx(100 - (DOUBT_UNTIL_S - DOUBT_AFTER_S), abs=TICK_S)
    watch.arrived()
    assert counted(watch, clock, 3) == 3


def test_no_time_counts_while_the_link_is_down():
    clock = FakeClock()
    watch = Watch(clock)
    watch.link_is_up = False
    assert counted(watch, clock, 100, arriving=True) == 0
    watch.link_is_up = True
    assert counted(watch, clock, 10, arriving=True) == 10
