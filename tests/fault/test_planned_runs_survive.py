"""Faults while parts are planned from measurements, follow importance, and change.

Three planned devices that measured themselves, of unequal speed. With one micro-batch in flight
per device every sum is taken in the same order, so a disturbed run must not differ by a bit.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from coordinator.planner import DevicePlan
from coordinator.registry import Stage
from shared.architecture import ModelArchitecture
from shared.errors import MemoryFullError
from shared.protocol.messages import Assignment, DeviceId, EvaluationResult, Ready
from tests.support.faults import Latency, RandomFaults
from tests.support.fleets import Machine
from tests.support.outcomes import LINES, PATIENT, USUAL, difference, outcome_of
from tests.support.simulation import Simulation
from tests.support.traffic import messages

KINDS = frozenset(
    {"activations", "gradients", "requests", "commands", "adapter", "handback", "weights",
     "telemetry", "status"}
)  # fmt: skip
DISTURBANCES = {
    "drop": {"drop": 0.15},
    "delay": {"delay": 0.3, "delay_s": 4.0},
    "duplicate": {"duplicate": 0.4, "delay_s": 8.0},
    "reorder": {"reorder": 0.5},
    "all": {"drop": 0.08, "delay": 0.1, "duplicate": 0.15, "reorder": 0.2, "delay_s": 8.0},
}
SPEEDS = {"a": 1.0, "b": 0.5, "c": 0.2}
CHANGES = {1: {"a": 2, "b": 3, "c": None}, 2: {"a": 1, "b": None, "c": 2}}
"""After which round who gets how many blocks; None: as many as it has, and one sequence more."""


class Profiled:
    """Stands where a profiler does: says what a machine of this kind would have measured."""

    def __init__(self, machine):
        self._machine = machine

    def pieces(self, request):
        return ("embeddings", "block.0")

    def measure(self, request, files):
        return self._machine.measured(ModelArchitecture.from_config(json.loads(request.config_json)))


def planned(folder, *, hand_back="residual", labels="device", rules=USUAL, faults=None, **settings):
    sim = Simulation(
        folder,
        settings={
            "rounds": {"count": 3, "steps": 2},
            "plan": {
                "batch": 4, "micro_batch": 2, "in_flight": 1, "probe_sequences": 3,
                "probe_every": 1,
            },
            "lora": {"r": 8, "target_modules": ["c_attn", "c_fc"]},
            "devices": {**rules, "expected": 3, "wait_s": 1e6},
            "optimizer": {"learning_rate": 1e-2},
            "aggregation": {"hand_back": hand_back},
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
            **settings,
        },
        faults=Latency() if faults is None else Latency(faults),
        model_changes={"n_layer": 4},
    )  # fmt: skip
    for name, speed in SPEEDS.items():
        add(sim, name, speed)
    return sim


def add(sim, name, speed):
    device = sim.add_device(name, lines=LINES)
    device.parts = device.agent._parts = replace(
        device.parts, profiler=Profiled(Machine(speed=speed))
    )
    return device


def sent(sim, kind):
    return [m.message for m in messages(sim.broker.traffic) if isinstance(m.message, kind)]


def dictate(monkeypatch, sim, changes=CHANGES):
    """Move blocks as ``changes`` says, whatever the fleet would decide; ranks follow importance."""
    replan = sim.fleet.replan

    def dictated(waiting, *, others, round_, steps_left):
        decided = dict(
            replan(waiting, others=others, round_=round_, steps_left=steps_left)
        )
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
        faults = None if odds is None else RandomFaults(len(name), kinds=KINDS, **odds)
        with monkeypatch.context() as patch:
            folder = tmp_path / name
            folder.mkdir()
            sim = planned(folder, labels=labels, hand_back=hand_back, rules=PATIENT, faults=faults)
            dictate(patch, sim)
            sim.run()
        outcomes[name] = outcome_of(sim)
        assert any(len(set(m.ranks.values())) > 1 for m in sent(sim, Assignment)), "none moved"
        assert any(m.keep for m in sent(sim, Assignment))
        assert any(m.importance for m in sent(sim, EvaluationResult))
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
    assert sim.coordinator.finished


def test_who_prepares_for_too_long_gets_the_right_weights_later(tmp_path, monkeypatch):
    """One device keeps its blocks, says so after the next round began, and merges stay exact."""
    pass
