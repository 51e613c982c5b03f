"""Two coordinators on one broker: the first stays, the second is told to go."""

from __future__ import annotations

import pytest

from coordinator.presence import SETTLED_AFTER_S, Presence
from shared.errors import RefusedError
from shared.protocol.messages import RunId
from tests.support.fake_clock import FakeClock


def test_a_newcomer_is_refused_by_the_settled_one():
    clock = FakeClock()
    first = Presence(RunId("first"), clock)
    assert first.handle(first.will.birth) is None
    clock.advance(SETTLED_AFTER_S)
    second = Presence(RunId("second"), clock)
    assert second.handle(second.will.birth) is None
    again = first.handle(second.will.birth)
    assert again is not None
    with pytest.raises(RefusedError, match="run first"):
        second.handle(again)
    # Its goodbye overwrites what the broker retains, so the first speaks once more.
    assert first.handle(second.will.death) is not None


def test_what_the_broker_retained_of_a_dead_one_is_ignored():
    clock = FakeClock()
    dead, alive = Presence(RunId("dead"), clock), Presence(RunId("alive"), clock)
    assert alive.handle(dead.will.birth) is None
    assert alive.handle(alive.will.birth) is None


def test_of_two_that_start_at_once_one_stays():
    clock = FakeClock()
    both = [Presence(RunId(name), clock) for name in ("one", "two")]
    outcomes = []
    for own, other in (both, both[::-1]):
        own.handle(own.will.birth)
        try:
            outcomes.append(own.handle(other.will.birth))
        except RefusedError:
            outcomes.append(None)
    assert outcomes.count(None) == 1


def test_garbage_on_the_topic_is_passed_over():
    presence = Presence(RunId("run"), FakeClock())
    presence.handle(presence.will.birth)
    assert presence.handle(b"\xff") is None
    assert presence.handle(b"[1]") is None
