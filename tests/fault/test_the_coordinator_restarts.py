"""Law 6 for the coordinator: it dies in the midst of a round and goes on from its checkpoint.

What is equal: everything, to the bit, as long as every module of a device's front is also held
by somebody else, as here. Such a module is handed back anew at every round, moments and all,
so it does not matter that after the restart the devices start from nothing. A module that one
device alone holds keeps its moments from round to round in an undisturbed run, and loses them
with its coordinator: there the restart is a hand-back more, and the global update that it
starts from is the same, but not what AdamW makes of it. (The server keeps what only the server
holds: its moments are in the checkpoint.)
"""

from __future__ import annotations

import pytest

from shared.protocol.messages import DeviceId, JoinRequest
from shared.protocol.topics import device_topic
from shared.transport.memory import MemoryTransport
from tests.support.outcomes import LINES, TOLERANCE, USUAL, difference, outcome_of, trio
from tests.support.simulation import Simulation
from tests.support.traffic import message_in

LOST = {**USUAL, "min": 2, "expected": 3}


@pytest.mark.parametrize(
    ("labels", "phase"),
    [("device", "round 1, step 0"), ("server", "round 2, step 3"), ("device", "round 3, step 5")],
)
def test_a_restart_within_a_round_changes_nothing(labels, phase, tmp_path, undisturbed):
    sim = trio(tmp_path, labels=labels, rounds=3)
    sim.run_to(phase)
    sim.run_for(0.35)
    sim.restart_coordinator()
    sim.run()
    expected = undisturbed(labels=labels, rounds=3)
    assert difference(outcome_of(sim), expected) == 0.0
    assert outcome_of(sim).losses == expected.losses


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_with_merge_it_changes_the_rounding_of_what_is_folded(optimizer, tmp_path, undisturbed):
    """All of G is folded at once where the undisturbed run folded it round by round."""
    sim = trio(tmp_path, hand_back="merge", optimizer=optimizer, rounds=3)
    sim.run_to("round 3, step 5")
    sim.restart_coordinator()
    sim.run()
    expected = undisturbed(hand_back="merge", optimizer=optimizer, rounds=3)
    assert difference(outcome_of(sim), expected) <= TOLERANCE[optimizer]


def test_it_may_restart_again_and_again(tmp_path, undisturbed):
    sim = trio(tmp_path)
    for phase in ("round 1, step 1", "round 1, step 1", "round 2, step 2", "round 2, step 3"):
        sim.run_to(phase)
        sim.restart_coordinator()
    sim.run()
    assert difference(outcome_of(sim), undisturbed()) == 0.0


def test_a_device_may_be_gone_when_it_comes_back(tmp_path):
    """Nobody asks for the server's first block then, which the checkpoint yet holds."""
    lost, gone = trio(tmp_path / "lost", rules=LOST), trio(tmp_path / "gone", rules=LOST)
    lost.run_to("round 2, step 2")
    lost.vanish("a")
    lost.run()
    gone.run_to("round 2, step 2")
    gone.run_for(0.35)
    gone.vanish("a")
    gone.restart_coordinator()
    gone.run()
    assert difference(outcome_of(gone), outcome_of(lost)) == 0.0


def test_a_device_that_needs_another_block_of_the_server_may_come_after_a_restart(tmp_path):
    sim = trio(tmp_path, rules=LOST, devices="bc")
    sim.run_to("round 2, step 2")
    assert sim.model.trainer.first_block == 2
    sim.restart_coordinator()
    sim.add_device("a", lines=LINES)
    sim.run()
    assert sim.model.trainer.first_block == 1
    assert outcome_of(sim).tokens["a"] > 0


def test_a_request_to_join_from_before_it_died_does_not_unseat_the_device(tmp_path, undisturbed):
    """The device has joined again by then, as a later session of the same start."""
    sim = trio(tmp_path)
    sim.run_to("round 1, step 0")
    topic = device_topic(DeviceId("a"), "requests")
    request = next(payload for name, payload in sim.broker.traffic if name == topic.name)
    assert isinstance(message_in(request), JoinRequest)
    sim.restart_coordinator()
    sim.run_to("round 2, step 3")
    late = MemoryTransport(sim.broker, name="late")
    late.start((), timeout_s=1)
    late.publish(topic, request)
    sim.run()
    assert difference(outcome_of(sim), undisturbed()) == 0.0


def alone(folder, optimizer):
    return Simulation(
        folder,
        settings={
            "rounds": {"count": 2, "steps": 2},
            "plan": {"split_layer": 2, "batch": 4},
            "optimizer": {"name": optimizer, "learning_rate": 1e-2, "rewarm_steps": 0},
            "training": {"max_length": 48, "wire_dtype": "float32"},
        },
    )


def test_what_one_device_alone_holds_starts_with_new_moments(tmp_path):
    """The limit of the law, kept here so that it is noticed if it moves."""
    sims = [alone(tmp_path / name, "adamw") for name in ("undisturbed", "restarted")]
    for sim in sims:
        sim.add_device("a", lines=LINES)
        sim.run_to("round 2, step 2")
    at_the_start = [{m: one.total for m, one in sim.model.update.items()} for sim in sims]
    sims[1].restart_coordinator()
    for sim in sims:
        sim.run()
    for module, total in at_the_start[0].items():
        assert (total.delta_OI() == at_the_start[1][module].delta_OI()).all()
    assert 1e-3 < difference(outcome_of(sims[1]), outcome_of(sims[0])) < 0.5
