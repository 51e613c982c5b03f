"""Who was late how often, and which rounds it sits out."""

from __future__ import annotations

import json

import pytest

from coordinator.lateness import MOST_ROUNDS_OUT, STATE, Lateness
from shared.errors import StorageError
from shared.protocol.messages import DeviceId

NANO, ORIN = DeviceId("nano"), DeviceId("orin")


def rounds_out(lateness, device, *, after):
    """Return how many rounds follow on ``after`` without the device."""
    return next(n for n in range(1000) if not lateness.sits_out(device, after + 1 + n))


def test_the_first_two_times_cost_no_further_round():
    lateness = Lateness()
    assert [lateness.late(NANO, round_) for round_ in (4, 5)] == [1, 2]
    assert not lateness.sits_out(NANO, 6)


def test_from_the_third_time_on_it_sits_out_ever_more_rounds():
    lateness = Lateness()
    found, round_ = [], 1
    for _ in range(9):
        lateness.late(NANO, round_)
        found.append(rounds_out(lateness, NANO, after=round_))
        round_ += 1 + found[-1]
    assert found == [0, 0, 1, 2, 4, 8, 16, 16, 16]
    assert max(found) == MOST_ROUNDS_OUT
    assert not lateness.sits_out(ORIN, 2)


def test_a_round_that_it_saw_to_its_end_clears_its_record():
    lateness = Lateness()
    for round_ in (1, 2, 3):
        lateness.late(NANO, round_)
    lateness.delivered([NANO, ORIN])
    assert not lateness.sits_out(NANO, 4)
    assert lateness.late(NANO, 5) == 1


def test_a_checkpoint_remembers():
    before, after = Lateness(), Lateness()
    for round_ in (1, 2, 3):
        before.late(NANO, round_)
    after.resume(json.loads(json.dumps(before.state())))
    assert after.sits_out(NANO, 4)
    assert not after.sits_out(NANO, 5)
    assert after.late(NANO, 5) == 4
    after.resume({})  # of a version that kept no record


@pytest.mark.parametrize(
    "damaged",
    [7, {}, {"in_a_row": 3, "out_before": {}}, {"in_a_row": {"a": "x"}, "out_before": {}}],
)
def test_a_damaged_record_is_named(damaged):
    with pytest.raises(StorageError, match="record of delays is damaged"):
        Lateness().resume({STATE: damaged})
