"""A device that is there, and does not do its part: the others wait a while, and not for ever."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from coordinator import checkpoints
from coordinator.coordinator import MOST_VOID_ROUNDS
from coordinator.settings import DeviceRules
from shared.errors import HsplitError, QuorumError
from shared.protocol.messages import Activations, HiddenGradients, RoundResult
from shared.protocol.tensors import pack, unpack
from tests.support.faults import Rule, ScriptedFaults
from tests.support.fleets import Machine
from tests.support.outcomes import PLANS, USUAL, difference, outcome_of, trio
from tests.support.planned import add_measured, planned
from tests.support.traffic import message_in

LEAST_S = DeviceRules().late_after_s
TWO_OF_THREE = {**USUAL, "min": 2, "expected": 3}
WITHOUT_PROBES = {"batch": 8, "micro_batch": 2, "in_flight": 1, "ranks": "uniform"}


def is_of(parcel, *, device, kind, message=None, **fields):
    """Tell whether a parcel is of this device and kind, and its message has these fields."""
    if parcel.kind != kind or not parcel.sender.startswith(f"{device}-"):
        return False
    if message is None:
        return True
    found = message_in(parcel.payload)
    return isinstance(found, message) and all(getattr(found, k) == v for k, v in fields.items())


def late_in_rounds(sim, device):
    """Return a list that fills with the rounds that this device was left out of."""
    rounds, late = [], sim.lateness.late

    def noted(who, round_):
        if who == device:
            rounds.append(round_)
        return late(who, round_)

    sim.lateness.late = noted
    return rounds


def plans_of(sim, device):
    """Return a list that fills with the parts that this device is given."""
    plans = []
    assign = sim.coordinator._assigner._assign

    def noted(member, plan):
        if member.device_id == device:
            plans.append(plan)
        return assign(member, plan)

    sim.coordinator._assigner._assign = noted
    return plans


trains = partial(is_of, kind="activations", message=Activations, purpose="train")


def finish(sim):
    """Drive everybody until the run is over, though some device never hears of it."""
    sim.run(until=lambda: sim.coordinator.finished)
    sim.reporter.close()


def slow(**seconds):
    """Return faults that delay every training micro-batch of the named devices."""
    rules = [Rule(partial(trains, device=one), (late_s,), None) for one, late_s in seconds.items()]
    return ScriptedFaults(rules)


def lagging(folder):
    """Return a simulation in which a step of device c takes 35 s or more; two are enough.

    It always misses the round after one that went on without it: it hears of that too late.
    """
    return planned(
        folder,
        rules=TWO_OF_THREE,
        faults=slow(a=2.0, c=35.0),
        rounds={"count": 16, "steps": 1},
        plan=WITHOUT_PROBES,
    )


def test_one_that_never_keeps_up_gets_a_lighter_plan_and_then_sits_out_ever_more_rounds(
    tmp_path, monkeypatch
):
    """It measured itself as quick as the others, and is not."""
    monkeypatch.setattr("tests.support.planned.SPEEDS", dict.fromkeys("abc", 1.0))
    sim = lagging(tmp_path)
    rounds, plans = late_in_rounds(sim, "c"), plans_of(sim, "c")
    sim.run()
    assert rounds == [1, 3, 5, 7, 10, 15]
    first, second, third = plans[:3]
    assert (second.split_layer, second.batch) == (first.split_layer, first.batch)
    assert third.split_layer < first.split_layer or third.batch < first.batch
    assert "c" not in outcome_of(sim).tokens or outcome_of(sim).tokens["c"] == 0
    assert sim.devices["c"].error is None


def test_one_that_was_late_once_is_back_in_the_next_round(tmp_path):
    first = partial(is_of, device="c", kind="activations", message=Activations, round=1)
    late = ScriptedFaults([Rule(first, (2 * LEAST_S,), None)])
    sim = planned(tmp_path, faults=late)
    rounds = late_in_rounds(sim, "c")
    sim.run()
    assert rounds == [1]
    assert outcome_of(sim).tokens["c"] > 0


def test_the_others_lose_one_deadline_to_one_that_hangs(tmp_path):
    hangs = partial(is_of, device="c", kind="activations", message=Activations, step=3)
    sim = planned(tmp_path, rules=TWO_OF_THREE, faults=ScriptedFaults([Rule(hangs, (), None)]))
    sim.run_to("round 2, step 3")
    began_s = sim.clock.monotonic_s()
    sim.run(until=lambda: "round 2" not in sim.coordinator.phase)
    assert LEAST_S < sim.clock.monotonic_s() - began_s < LEAST_S + 5
    finish(sim)


@pytest.mark.parametrize("kind", ["activations", "adapter"])
def test_it_sits_out_only_where_enough_others_are_there(kind, tmp_path):
    """All three must be there: the slow one is taken in although it was late again and again."""
    sim = planned(
        tmp_path,
        rules={**USUAL, "min": 3, "step_timeout_s": 20.0},
        faults=ScriptedFaults([Rule(partial(is_of, device="c", kind=kind), (40.0,), None)]),
        rounds={"count": 5, "steps": 1},
    )
    rounds = late_in_rounds(sim, "c")
    sim.run()
    assert rounds == [1, 2, 3, 4, 5]


def test_one_that_trains_alone_and_never_delivers_is_not_waited_for(tmp_path):
    plans = {**PLANS, "c": {"split_layer": 4, "batch": 3}}
    hands_in = partial(is_of, device="c", kind="adapter", message=RoundResult)
    sim = trio(
        tmp_path,
        plans=plans,
        rules={**TWO_OF_THREE, "step_timeout_s": 20.0},
        faults=ScriptedFaults([Rule(hands_in, (), None)]),
    )
    rounds = late_in_rounds(sim, "c")
    finish(sim)
    assert rounds == [1]
    assert outcome_of(sim).tokens.get("c", 0) == 0


class Shameless:
    """An agent that stays connected, and alive, whatever it is told."""

    def __init__(self, agent):
        self._agent = agent
        self.told = None

    def __getattr__(self, name):
        return getattr(self._agent, name)

    def turn(self, timeout_s):
        if self.told is not None:
            return False
        try:
            return self._agent.turn(timeout_s)
        except HsplitError as error:
            self.told = error
            return False


@pytest.mark.parametrize("labels", ["device", "server"])
def test_bad_numbers_hold_up_nobody_even_if_their_sender_stays(labels, tmp_path):
    sim = trio(tmp_path, labels=labels, rules={**TWO_OF_THREE, "lost_after_s": 1e6})
    device = sim.devices["c"]
    device.agent = Shameless(device.agent)
    forward = device.parts.backend.forward

    def bad(key, batch, *, train):
        frame = forward(key, batch, train=train)
        return pack(unpack(frame) * np.nan) if train and key.step == 3 else frame

    device.parts.backend.forward = bad
    sim.run_to("round 2, step 3")
    began_s = sim.clock.monotonic_s()
    finish(sim)
    assert device.agent.told is not None
    assert sim.clock.monotonic_s() - began_s < 5, "nobody waited for it"


def test_what_the_coordinator_slept_through_is_nobodys_silence(tmp_path, undisturbed):
    sim = trio(tmp_path)
    sim.run_to("round 1, step 1")
    sim.clock.advance(3600.0)
    sim.coordinator.turn(0.0)
    sim.run(limit_s=1e5)
    assert difference(outcome_of(sim), undisturbed()) == 0.0
    assert outcome_of(sim).losses == undisturbed().losses, "no round was repeated"


def test_a_coordinator_that_hears_nothing_at_all_suspects_its_own_link(tmp_path, undisturbed):
    """For longer than a device may be silent: it takes a keep-alive to find out."""
    deaf = Deaf()
    sim = trio(tmp_path, faults=deaf)
    sim.run_to("round 1, step 1")
    deaf.until_s = sim.clock.monotonic_s() + 20.0
    deaf.clock = sim.clock
    sim.run()
    assert difference(outcome_of(sim), undisturbed()) == 0.0
    assert outcome_of(sim).losses == undisturbed().losses, "no round was repeated"


class Deaf:
    """Nothing reaches the coordinator, or leaves it, for a while; nobody is told."""

    clock = None
    until_s = 0.0

    def delays_s(self, parcel):
        is_dead = self.clock is not None and self.clock.monotonic_s() < self.until_s
        return () if is_dead else (0.0,)


def test_a_restarted_coordinator_knows_who_was_late(tmp_path):
    sim = lagging(tmp_path)
    rounds = late_in_rounds(sim, "c")
    sim.run_to("round 8, step 7")
    assert rounds == [1, 3, 5, 7]
    sim.restart_coordinator()
    assert [sim.lateness.sits_out("c", round_) for round_ in (8, 9, 10)] == [True, True, False]
    sim.reporter.close()


def test_a_round_that_everybody_is_late_for_is_repeated_and_at_last_given_up(tmp_path):
    rule = Rule(lambda parcel: parcel.kind == "activations", (60.0,), None)
    sim = trio(tmp_path, rules={**USUAL, "step_timeout_s": 1.0}, faults=ScriptedFaults([rule]))
    with pytest.raises(QuorumError, match=f"lost every device {MOST_VOID_ROUNDS} times in a row"):
        sim.run()
    assert checkpoints.latest(sim.config.run_folder / "checkpoints").round == 0


def test_a_machine_that_measured_itself_is_given_the_time_that_it_needs(tmp_path, monkeypatch):
    """Its step takes longer than `late_after_s`, and it said so: nobody is late."""
    monkeypatch.setattr("tests.support.planned.SPEEDS", dict.fromkeys("abc", 1e-4))
    sim = planned(tmp_path, faults=slow(c=20.0), rounds={"count": 2, "steps": 1})
    rounds = late_in_rounds(sim, "c")
    sim.run()
    assert rounds == []
    assert outcome_of(sim).tokens["c"] > 0


def test_what_a_device_starts_from_and_delivers_has_its_time_on_its_link(tmp_path):
    """Of a small batch and of much that was learnt, factors are more than a step's activations."""
    rules = {**USUAL, "min": 4, "expected": 4}
    sim = planned(tmp_path, rules=rules, rounds={"count": 2, "steps": 1}, plan=WITHOUT_PROBES)
    slow = Machine(uplink=2e3, downlink=1e3)
    add_measured(sim, "slow", slow)
    sim.run(until=lambda: "round 2" in sim.coordinator.phase)
    driver = sim.coordinator._driver
    allowed, handed = driver.round._allowances["slow"], driver._handed
    factor = sim.config.devices.late_factor
    assert allowed.hand_in_s == factor * handed.bytes_from("slow") / slow.uplink > 0.0
    down_s = factor * handed.bytes_to("slow") / slow.downlink
    assert allowed.evaluate_s >= LEAST_S + down_s > LEAST_S
    finish(sim)


@pytest.mark.parametrize("gives_back", [False, True])
def test_one_that_trains_alone_takes_no_room_on_the_server_from_the_others(gives_back, tmp_path):
    """The round does not wait for its micro-batches, so it could keep them open for ever."""
    sim = trio(
        tmp_path,
        plans={**PLANS, "c": {"split_layer": 4, "batch": 3}},
        rules={**TWO_OF_THREE, "open_micro_batches": 3},
    )
    sim.run_to("round 1, step 0")
    conversation = sim.devices["c"].agent._conversation
    tensor = pack(np.zeros((2, 32), np.float32))
    here = {"round": 1, "step": 0}

    def hidden(call, index):
        parts = {"micro_batch": index, "micro_batches": 3, "lengths": (2,), "target_tokens": 1}
        return Activations(call=call, purpose="train", hidden=tensor, labels=None, **here, **parts)

    def gradients(call):
        return HiddenGradients(call=call, micro_batch=0, loss_sum=1.0, gradient=tensor, **here)

    for index in range(3):
        conversation.post(partial(hidden, index=index), "activations")
    if gives_back:
        sim.run_for(1.0)
        conversation.post(gradients, "activations")
    finish(sim)
    assert sim.coordinator.finished
