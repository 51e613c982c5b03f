"""A run whose parts are planned from what devices measured, from joining to the end."""

from __future__ import annotations

import pytest

from shared.errors import MemoryFullError
from shared.protocol.messages import Assignment, EvaluationResult, Ready, Refusal
from tests.support.fleets import Machine
from tests.support.planned import add_measured
from tests.support.simulation import Simulation
from tests.support.traffic import sent

SETTINGS = {
    "rounds": {"count": 3, "steps": 2},
    "plan": {"batch": 4, "probe_sequences": 3},
    "lora": {"r": 8, "target_modules": ["c_attn", "c_fc", "c_proj"]},
    "optimizer": {"learning_rate": 2e-2},
    "devices": {"min": 2, "expected": 2, "wait_s": 60},
    "training": {"max_length": 48, "wire_dtype": "float32"},
}


def system(folder, machines, **settings):
    sim = Simulation(folder, settings={**SETTINGS, **settings}, model_changes={"n_layer": 4})
    for name, machine in machines.items():
        add_measured(sim, name, machine)
    return sim


def test_parts_follow_from_measurements_and_ranks_from_importance(tmp_path):
    fast, slow = Machine(speed=1.0), Machine(speed=0.2)
    sim = system(tmp_path, {"fast": fast, "slow": slow})
    sim.run_to("round 1, step 1")
    plans = {m.device_id: m.plan for m in sim.coordinator.members.registry}
    assert plans["fast"].batch > plans["slow"].batch
    assert plans["fast"].batch + plans["slow"].batch == 2 * 4
    sim.run()
    assert sim.reporter.summary().perplexity_after < sim.reporter.summary().perplexity_before
    # Both were told to measure at the run's micro-batch, and sent what came of it.
    assert {len(d.parts.profiler.asked) for d in sim.devices.values()} == {1}
    assert all(
        one.measurements is not None and one.data is not None
        for one in sent(sim.broker.traffic, Ready)
    )
    # Importance was probed in the first and the third round, by both, and moved the ranks.
    probed = [one.round for one in sent(sim.broker.traffic, EvaluationResult) if one.importance]
    assert sorted(probed) == [1, 1, 3, 3]
    assert sim.fleet.importance.scores
    kept = [one for one in sent(sim.broker.traffic, Assignment) if one.keep]
    assert {one.plan_version for one in kept} == {2}
    assert any(len(set(one.ranks.values())) > 1 for one in kept)


def test_without_adapting_parts_stay(tmp_path):
    plan = {**SETTINGS["plan"], "adapt": False}
    sim = system(tmp_path, {"a": Machine(), "b": Machine()}, plan=plan)
    sim.run()
    assert {one.plan_version for one in sent(sim.broker.traffic, Assignment)} == {1}


def test_a_device_that_fits_nothing_is_refused_by_name_and_the_others_go_on(tmp_path):
    tiny = Machine(memory_bytes=260_000_000)
    sim = system(
        tmp_path,
        {"a": Machine(), "tiny": tiny},
        devices={"min": 1, "expected": 2, "wait_s": 60},
    )
    sim.run()
    assert sim.coordinator.finished
    (refusal,) = sent(sim.broker.traffic, Refusal)
    assert refusal.code == "does_not_fit"
    assert "tiny" in refusal.reason
    assert "248 MiB" in refusal.reason  # what it may use; what one block needs stands beside it
    assert sim.devices["tiny"].error is not None
    assert sim.devices["a"].error is None


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_device_whose_memory_is_full_in_a_round_gets_a_lighter_part(
    tmp_path, monkeypatch, labels
):
    slow_server = {"in_flight": 1, **SETTINGS["plan"]}
    sim = system(
        tmp_path,
        {"a": Machine(), "b": Machine()},
        plan=slow_server,
        devices={"min": 1, "expected": 2, "wait_s": 60},
        training={**SETTINGS["training"], "labels": labels},
        rounds={"count": 4, "steps": 2},
    )
    # A slow server leaves much to the devices.
    sim.fleet._measure_server = lambda *_: Machine(speed=0.05).measured(sim.fleet._architecture)
    sim.run_to("round 1, step 1")
    held = {m.device_id: m.plan.split_layer for m in sim.coordinator.members.registry}
    backend = sim.devices["b"].parts.backend
    step = backend.step

    def full(number, **rest):
        if backend._front.blocks.stop == held["b"]:
            raise MemoryFullError("this device is out of memory")
        return step(number, **rest)

    monkeypatch.setattr(backend, "step", full)
    sim.run()
    (overloaded,) = [one for one in sent(sim.broker.traffic, Ready) if one.overloaded]
    assert "out of memory" in overloaded.overloaded
    assert held["b"] > 1
    lighter = [one.split_layer for one in sent(sim.broker.traffic, Assignment)]
    assert held["b"] - 1 in lighter
    assert sim.devices["b"].error is None
    assert sim.devices["a"].error is None
    assert sim.coordinator.finished
