"""Faults while parts are planned from measurements, follow importance, and change.

Three planned devices that measured themselves, of unequal speed. With one micro-batch in flight
per device every sum is taken in the same order, so a disturbed run must not differ by a bit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.aggregation import SERVER
from coordinator.deadlines import MOST_TIMEOUTS
from coordinator.registry import Stage
from shared.errors import HsplitError, MemoryFullError
from shared.protocol.messages import Assignment, EvaluationResult, PieceRequest, Ready
from shared.protocol.profile import BlockPoint, LinkMeasurement
from tests.support.faults import DISTURBANCES, KINDS, RandomFaults, Rule, ScriptedFaults
from tests.support.law_4 import weights_compared
from tests.support.outcomes import PATIENT, USUAL, difference, outcome_of
from tests.support.planned import SPEEDS, add, planned
from tests.support.spies import watch_hand_backs
from tests.support.traffic import sent

CHANGES = {1: {"a": 2, "b": 3, "c": None}, 2: {"a": 1, "b": None, "c": 2}}
"""After which round who gets how many blocks; None: as many as it has, and one sequence more."""


def dictate(monkeypatch, sim, changes=CHANGES):
    """Move blocks as ``changes`` says, whatever the fleet would decide; ranks follow importance."""
    replan = sim.fleet.replan

    def dictated(waiting, *, others, round_, steps_left):
        decided = dict(replan(waiting, others=others, round_=round_, steps_left=steps_left))
        for member in waiting:
            if member.device_id in changes.get(round_, {}):
                blocks = changes[round_][member.device_id]
                decided[member.device_id] = other_part(sim, member.plan, blocks)
        return decided

    monkeypatch.setattr(sim.fleet, "replan", dictated)


def other_part(sim, plan, blocks):
    kept = blocks or plan.split_layer
    ranks, scalings = sim.fleet.server_ranks(range(kept))
    batch = plan.batch + (blocks is None)
    return replace(plan, split_layer=kept, ranks=ranks, scalings=scalings, batch=batch)


@pytest.mark.parametrize("hand_back", ["residual", "merge"])
@pytest.mark.parametrize("labels", ["device", "server"])
def test_no_disturbance_changes_a_planned_run(tmp_path, monkeypatch, labels, hand_back):
    outcomes = {}
    for name, odds in {"none": None, **DISTURBANCES}.items():
        faults = None if odds is None else RandomFaults(len(name), kinds=frozenset(KINDS), **odds)
        with monkeypatch.context() as patch:
            folder = tmp_path / name
            folder.mkdir()
            sim = planned(folder, labels=labels, hand_back=hand_back, rules=PATIENT, faults=faults)
            dictate(patch, sim)
            sim.run()
        outcomes[name] = outcome_of(sim)
        given = sent(sim.broker.traffic, Assignment)
        assert any(len(set(m.ranks.values())) > 1 for m in given), "none moved"
        assert any(m.keep for m in given)
        assert any(m.importance for m in sent(sim.broker.traffic, EvaluationResult))
    apart = {name: difference(one, outcomes["none"]) for name, one in outcomes.items()}
    assert apart == dict.fromkeys(outcomes, 0.0)


def test_memory_that_is_full_in_the_last_evaluation_does_not_hang_the_run(tmp_path, monkeypatch):
    sim = planned(tmp_path, rounds={"count": 1, "steps": 1})
    sim.run_to("round 2, step 1")
    backend = sim.devices["b"].parts.backend

    def full(*_args, **_terms):
        raise MemoryFullError("this device is out of memory")

    monkeypatch.setattr(backend, "forward", full)
    sim.run()
    assert [one.overloaded for one in sent(sim.broker.traffic, Ready) if one.overloaded]
    assert sim.coordinator.finished


@pytest.mark.parametrize("hand_back", ["residual", "merge"])
def test_who_waited_long_for_a_slow_device_still_gets_its_change(tmp_path, monkeypatch, hand_back):
    """Parts change after rounds in which somebody waited longer than a step may take."""
    slow = Rule(lambda parcel: parcel.kind == "activations" and "/a/" in parcel.topic, (6.0,), None)
    sim = planned(
        tmp_path,
        hand_back=hand_back,
        rules={"min": 1, "lost_after_s": 6.0, "step_timeout_s": 10.0, "late_after_s": 99.0},
        faults=ScriptedFaults([slow]),
        checkpoints={"keep": 99},
        rounds={"count": 4, "steps": 2},
    )
    dictate(monkeypatch, sim, {1: {"c": None}, 2: {"c": None}})
    seen = watch_hand_backs(monkeypatch, sim)
    sim.run()
    assert weights_compared(sim, seen) > 20
    for round_ in range(1, 5):
        assert {held.holder for held in seen if held.round == round_} == {"a", "b", "c", SERVER}


@pytest.mark.parametrize("hand_back", ["residual", "merge"])
@pytest.mark.parametrize("event", ["vanish", "rejoin", "restart", "leave", "void"])
def test_what_happens_while_parts_change_loses_nothing(tmp_path, monkeypatch, event, hand_back):
    sim = planned(
        tmp_path,
        hand_back=hand_back,
        rules={"min": 1, "lost_after_s": 6.0, "step_timeout_s": 100.0},
        checkpoints={"keep": 99},
        rounds={"count": 4, "steps": 2},
    )
    changes = {1: {"a": 2, "b": 3, "c": None}, 2: {"a": 1, "b": None, "c": 2}, 3: {"a": None}}
    dictate(monkeypatch, sim, changes)
    seen = watch_hand_backs(monkeypatch, sim)
    sim.run(until=lambda: is_changing(sim, "c") and sim.coordinator._next_round == 2)
    if event == "restart":
        sim.restart_coordinator()
        dictate(monkeypatch, sim, changes)
    elif event == "vanish":
        sim.vanish("c")
    elif event == "leave":
        sim.devices["c"].agent._conversation.leave("stopped")
        sim.vanish("c")
    elif event == "rejoin":
        sim.vanish("c")
        add(sim, "c", SPEEDS["c"])
    else:
        sim.run_to("round 2, step 2")
        for name in "abc":
            sim.vanish(name)
        for name in "abc":
            add(sim, name, SPEEDS[name])
    sim.run()
    assert weights_compared(sim, seen) > 20
    last = {held.holder for held in seen if held.round == 4}
    assert last == {"a", "b", SERVER} | (set() if event in ("vanish", "leave") else {"c"})


BLOCK = BlockPoint(
    blocks=1, adapter_parameters=0, sequences=1, length=1, forward_s=1.0, backward_s=1.0,
    peak_bytes=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "lies",
    [
        {"runtime_bytes": 2**60},
        {"blocks": tuple(replace(BLOCK, forward_s=5e-324, length=n) for n in (1, 2, 3))},
        {"blocks": (BLOCK, BLOCK, BLOCK), "head": (), "optimizer": ()},
        {"memory_bytes": 1},
        {"memory_bytes": 2**62, "runtime_bytes": 1},
        {"link": LinkMeasurement(
            uplink_bytes_per_s=1e-9, downlink_bytes_per_s=9e14, round_trip_s=9e5)},
    ],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("again", [False, True], ids=["at once", "once it has a part"])
def test_what_one_device_says_of_itself_harms_no_other(tmp_path, lies, again):
    """A device lies when it gets ready, or when it gets ready again after it had a part."""
    sim = planned(
        tmp_path, rules={**USUAL, "min": 2, "wait_s": 9.0}, rounds={"count": 3, "steps": 2}
    )
    liar = sim.devices["c"].parts.profiler
    if not again:
        liar.lies = lies
    sim.run_to("round 1, step 1")
    if again:
        ready_again(sim, "c", lies)
    add(sim, "d", 1.0)
    honest = [sim.devices[name] for name in ("a", "b", "d")]
    try:
        sim.run(until=lambda: all(one.agent.finished or one.error for one in honest))
    finally:
        sim.reporter.close()
    assert [str(one.error) for one in honest] == ["None"] * 3


def ready_again(sim, name, lies):
    """Let a device that took part get ready with lies, and then only stay in, saying nothing."""
    device = sim.devices[name]
    participation, conversation = device.agent._participation, device.agent._conversation
    participation._measurements = replace(participation._measurements, **lies)

    def life():
        device.parts.backend.discard()
        conversation.forget_calls()
        yield from ignoring(participation._ask_ready("too much"))

    def ignoring(script):
        waiting = next(script)
        while True:
            try:
                yield waiting
            except HsplitError:
                waiting = frozenset()

    device.agent._script = life()
    device.agent._waiting = None


def test_a_long_change_leaves_time_to_come_back_after_it(tmp_path, monkeypatch):
    rules = {"min": 3, "lost_after_s": 1e6, "step_timeout_s": 100.0, "join_timeout_s": 20.0}
    sim = planned(tmp_path, rules=rules)
    dictate(monkeypatch, sim, {1: {"c": 2}})
    sim.run(until=lambda: is_changing(sim, "c"))
    monkeypatch.setattr(sim.devices["c"].agent, "turn", lambda _timeout_s: False)
    sim.run_for(30.0)
    sim.vanish("c")
    sim.run_for(5.0)
    add(sim, "c", SPEEDS["c"])
    sim.run()
    assert sim.coordinator.finished


def test_one_that_prepares_for_ever_is_not_waited_for(tmp_path, monkeypatch):
    """It asks for the same bytes again and again, so it is never silent."""
    sim = planned(tmp_path, rules={"min": 2, "lost_after_s": 1e6, "step_timeout_s": 20.0})
    dictate(monkeypatch, sim, {1: {"c": 2}})
    sim.run(until=lambda: is_changing(sim, "c"))
    agent, began_s, asked_s = sim.devices["c"].agent, sim.clock.monotonic_s(), []
    piece = sim.coordinator._supplies._store.describe().pieces[0]

    def ask(_timeout_s):
        if sim.clock.monotonic_s() < began_s + 5 * len(asked_s):
            return agent._conversation.pump(0.0)
        asked_s.append(sim.clock.monotonic_s())
        agent._conversation.post(
            lambda call: PieceRequest(call=call, sha256=piece.sha256, offset=0, length=1)
        )
        return True

    monkeypatch.setattr(agent, "turn", ask)
    sim.run(until=lambda: sim.coordinator.finished)
    sim.reporter.close()
    assert len(asked_s) > 20
    assert sim.clock.monotonic_s() - began_s < 20.0 * MOST_TIMEOUTS + 20


def is_changing(sim, name):
    registry = sim.coordinator.members.registry
    return any(m.changing and m.stage is Stage.PREPARING for m in registry if m.device_id == name)
