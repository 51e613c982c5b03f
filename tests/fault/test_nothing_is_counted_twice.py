"""Law 6: whatever the network does, the run comes to what it would have come to without.

Three unequal devices. With one micro-batch in flight per device every sum is taken in the same
order, so the outcomes must not differ by a single bit.
"""

from __future__ import annotations

import pytest

from shared.protocol.topics import ROOT
from shared.transport.memory import DEFAULT_MAX_PAYLOAD_BYTES
from tests.support.faults import (
    DISTURBANCES,
    KINDS,
    RandomFaults,
    ScriptedFaults,
    delay_nth,
    drop_nth,
    duplicate_nth,
)
from tests.support.outcomes import PATIENT, TOLERANCE, difference, outcome_of, trio

SMALLEST_PAYLOAD_BYTES = 1088
"""A message then goes in chunks of 1 KiB, and most tensors need credit from their receiver."""


class Counted:
    """Faults that a run must have met, or it proves nothing."""

    def __init__(self, faults):
        self._faults = faults
        self.disturbed = 0

    def delays_s(self, parcel):
        delays = self._faults.delays_s(parcel)
        self.disturbed += tuple(delays) != (0.0,)
        return delays


@pytest.mark.parametrize("hand_back", ["residual", "merge"])
@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_no_disturbance_of_any_message_changes_the_outcome(
    disturbance, labels, hand_back, tmp_path, undisturbed
):
    settings = {"labels": labels, "hand_back": hand_back}
    seed = sum(f"{disturbance} {labels} {hand_back}".encode())
    faults = Counted(RandomFaults(seed, kinds=frozenset(KINDS), **DISTURBANCES[disturbance]))
    sim = trio(tmp_path, faults=faults, rules=PATIENT, **settings)
    sim.run()
    assert faults.disturbed > 10
    assert difference(outcome_of(sim), undisturbed(**settings)) == 0.0
    assert outcome_of(sim).losses == undisturbed(**settings).losses


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_several_micro_batches_in_flight_change_the_rounding_only(optimizer, tmp_path, undisturbed):
    settings = {"optimizer": optimizer, "micro_batch": 1}
    faults = RandomFaults(3, kinds=frozenset(KINDS), **DISTURBANCES["all"])
    sim = trio(tmp_path, faults=faults, rules=PATIENT, in_flight=4, **settings)
    sim.run()
    apart = difference(outcome_of(sim), undisturbed(**settings))
    assert 0.0 < apart <= TOLERANCE[optimizer], "0: the order of the sums was never another one"


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("disturbance", ["duplicate", "all"])
def test_nor_do_disturbances_of_chunks_and_credit(disturbance, labels, tmp_path, undisturbed):
    odds = {**DISTURBANCES[disturbance], "drop": 0.02 * (disturbance == "all")}
    faults = Counted(RandomFaults(5, kinds=frozenset(KINDS), **odds))
    sim = trio(
        tmp_path,
        faults=faults,
        rules=PATIENT,
        labels=labels,
        max_payload_bytes=SMALLEST_PAYLOAD_BYTES,
    )
    sim.run()
    assert len(sim.broker.traffic) > 1000
    assert faults.disturbed > 100
    assert difference(outcome_of(sim), undisturbed(labels=labels)) == 0.0


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_any_one_message_may_be_lost(kind, nth, tmp_path, undisturbed):
    assert_harmless([drop_nth(kind, nth)], tmp_path, undisturbed)


@pytest.mark.parametrize("kind", KINDS)
def test_any_one_message_may_come_twice_or_late(kind, tmp_path, undisturbed):
    rules = [duplicate_nth(kind, 2, after_s=2.0), delay_nth(kind, 5, by_s=9.0)]
    assert_harmless(rules, tmp_path, undisturbed)


def assert_harmless(rules, folder, undisturbed):
    sim = trio(folder, faults=ScriptedFaults(rules), rules=PATIENT)
    sim.run()
    assert all(rule.seen >= rule.nth for rule in rules), "the fault never happened"
    assert difference(outcome_of(sim), undisturbed()) == 0.0


class LateFirstMeeting:
    """The first request to join of ``a`` is late, and the first word to ``a`` later still."""

    def __init__(self, *, request_s, word_s):
        self._late = {f"{ROOT}/devices/a/requests": request_s, f"{ROOT}/devices/a/commands": word_s}

    def delays_s(self, parcel):
        return self._late.pop(parcel.topic, (0.0,))


@pytest.mark.parametrize(
    ("request_s", "word_s"),
    [((0.5,), (4.0,)), ((0.5, 3.0), (0.0, 4.0)), ((7.0,), (4.0,)), ((), (0.0, 4.0))],
)
def test_no_late_word_about_joining_takes_a_device_out_of_its_round(
    request_s, word_s, tmp_path, undisturbed
):
    faults = LateFirstMeeting(request_s=request_s, word_s=word_s)
    sim = trio(tmp_path, faults=faults, rules=PATIENT)
    sim.run()
    assert difference(outcome_of(sim), undisturbed()) == 0.0


@pytest.mark.parametrize("down_s", [1.0, 60.0])
@pytest.mark.parametrize(
    ("labels", "phase"),
    [
        ("device", "waiting for devices"),
        ("device", "round 1, step 1"),
        ("server", "round 2, step 3"),
    ],
)
def test_a_broker_may_restart_at_any_time(labels, phase, down_s, tmp_path, undisturbed):
    sim = trio(tmp_path, labels=labels)
    sim.run_to(phase)
    sim.run_for(0.15)
    sim.broker.stop()
    sim.run_for(down_s)
    sim.broker.restart()
    sim.run()
    assert outcome_of(sim).losses == undisturbed(labels=labels).losses, "a round was repeated"
    assert difference(outcome_of(sim), undisturbed(labels=labels)) == 0.0


@pytest.mark.parametrize("down_s", [0.5, 1.0, 4.0, 60.0])
def test_a_broker_that_is_back_holds_nobody_up(down_s, tmp_path):
    """What was under way is asked for at once, and not when it would have been overdue."""
    sim = trio(tmp_path)
    sim.run_to("round 1, step 1")
    sim.run_for(0.15)
    sim.broker.stop()
    sim.run_for(down_s)
    assert sim.coordinator.phase == "round 1, step 1", "the step must still be open"
    sim.broker.restart()
    back_s = sim.clock.monotonic_s()
    sim.run(until=lambda: sim.coordinator.phase != "round 1, step 1")
    took_s = sim.clock.monotonic_s() - back_s
    sim.run()
    assert took_s < 1.0


@pytest.mark.parametrize(
    ("phase", "payload_bytes"),
    [("round 1, step 0", SMALLEST_PAYLOAD_BYTES), ("round 2, step 3", DEFAULT_MAX_PAYLOAD_BYTES)],
)
def test_a_link_that_is_soon_mended_costs_nothing(phase, payload_bytes, tmp_path, undisturbed):
    sim = trio(tmp_path, max_payload_bytes=payload_bytes)
    sim.run_to(phase)
    for device in sim.devices.values():
        sim.run_for(0.15)
        device.transport.lose_link()
        sim.run_for(1.0)
        device.transport.reconnect()
    sim.run()
    assert outcome_of(sim).losses == undisturbed().losses, "a round was repeated"
    assert difference(outcome_of(sim), undisturbed()) == 0.0
