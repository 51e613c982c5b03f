"""Law 4 while parts change: blocks move between devices and server, and nothing is lost.

Four blocks, three devices. What the planner would decide is dictated here, so that every kind of
change happens: more blocks, fewer, all of them, other ranks alone, another batch alone.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from coordinator.aggregation import SERVER
from coordinator.planning.device_plan import DevicePlan
from shared.errors import PlanError
from shared.protocol.messages import Assignment, DeviceId, RoundStart
from tests.support.law_4 import weights_compared
from tests.support.outcomes import LINES, USUAL
from tests.support.simulation import Simulation
from tests.support.spies import watch_hand_backs
from tests.support.traffic import sent

TARGETS = ["c_attn", "c_fc"]
STEPS = 2
SETTINGS = {
    "rounds": {"count": 4, "steps": STEPS},
    "plan": {
        "batch": 4,
        "devices": {
            "a": {"split_layer": 1, "r": 2, "lora_alpha": 8.0},
            "b": {"split_layer": 2, "r": 4},
            "c": {"split_layer": 3, "r": 6},
        },
    },
    "lora": {"r": 8, "target_modules": TARGETS},
    "optimizer": {"learning_rate": 2e-2},
    "devices": USUAL,
    "checkpoints": {"keep": 99},
}
SPLITS = {
    1: {"a": 1, "b": 2, "c": 3},
    2: {"a": 3, "b": 1, "c": 3},  # up, down, other ranks and another batch
    3: {"a": 2, "b": 4, "c": 3},  # down, all blocks, nothing
    4: {"a": 2, "b": 2, "c": 1},
}
"""By round. The evaluation after the last round is as the last."""


def plan(split_layer: int, *, rank: int, batch: int = 4) -> DevicePlan:
    modules = [
        f"transformer.h.{block}.{name}"
        for block in range(split_layer)
        for name in ("attn.c_attn", "mlp.c_fc")
    ]
    ranks = {module: rank + i % 2 for i, module in enumerate(modules)}
    return DevicePlan(
        split_layer=split_layer,
        ranks=ranks,
        scalings=dict.fromkeys(modules, 2.0),
        batch=batch,
        micro_batch=2,
        in_flight=2,
    )


CHANGES = {
    1: {"a": plan(3, rank=3), "b": plan(1, rank=5), "c": plan(3, rank=2, batch=3)},
    2: {"a": plan(2, rank=4), "b": plan(4, rank=3)},
    3: {"b": plan(2, rank=1), "c": plan(1, rank=6)},
}
"""After which round who gets which part."""


def dictate(monkeypatch: pytest.MonkeyPatch, sim: Simulation) -> None:
    """Let the fleet decide what `CHANGES` says."""

    def replan(waiting, *, others, round_, steps_left):
        assert not others
        assert {member.device_id for member in waiting} == {"a", "b", "c"}
        return {DeviceId(device): new for device, new in CHANGES.get(round_, {}).items()}

    monkeypatch.setattr(sim.fleet, "replan", replan)


@pytest.fixture(
    scope="module",
    params=[("residual", "device"), ("residual", "server"), ("merge", "device")],
    ids="-".join,
)
def run(request, tmp_path_factory):
    """The finished run, what was seen of its hand-backs, and how often each device loaded."""
    hand_back, labels = request.param
    folder = tmp_path_factory.mktemp(f"{hand_back}-{labels}")
    training = {"max_length": 48, "labels": labels, "wire_dtype": "float32"}
    sim = Simulation(
        folder,
        settings={**SETTINGS, "training": training, "aggregation": {"hand_back": hand_back}},
        model_changes={"n_layer": 4},
    )
    loads = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        dictate(patch, sim)
        seen = watch_hand_backs(patch, sim)
        for device in "abc":
            added = sim.add_device(device, lines=LINES)
            count_loads(patch, device, added.parts.backend, loads)
        sim.run()
    return sim, seen, loads


def count_loads(patch, device, backend, loads) -> None:
    load = backend.load

    def counted(base, **terms):
        loads[device].append(base.split_layer)
        load(base, **terms)

    patch.setattr(backend, "load", counted)


def test_every_side_computes_with_the_same_weights_after_every_change(run):
    sim, seen, _ = run
    assert weights_compared(sim, seen) > 60


def test_blocks_moved_as_intended(run):
    _, seen, _ = run
    by_round = defaultdict(dict)
    for held in seen:
        by_round[held.round][held.holder] = held
    for round_, splits in SPLITS.items():
        held = {d: len({m.split(".")[2] for m in by_round[round_][d].weights}) for d in splits}
        assert held == splits, round_
    assert SERVER in by_round[2]


def test_who_keeps_its_blocks_loads_nothing_anew(run):
    sim, _, loads = run
    given = sent(sim.broker.traffic, Assignment)
    assert len(given) == 3 + 3 + 2 + 2
    assert [one.split_layer for one in given if one.keep] == [3]
    assert loads == {"a": [1, 3, 2], "b": [2, 1, 4, 2], "c": [3, 1]}


def test_a_changed_batch_goes_on_where_the_last_one_ended(run):
    sim, _, _ = run
    starts = [m for m in sent(sim.broker.traffic, RoundStart) if m.steps]
    positions = {one.first_sequence for one in starts if one.round == 4}
    # a and b take 4 sequences in each of the three rounds' two steps, c takes 4 once and then 3
    assert positions == {3 * 2 * 4, 2 * 4 + 2 * 2 * 3}


@pytest.mark.parametrize(("stated", "blocks"), [(True, 0), (False, 1)])
def test_a_device_that_cannot_hold_more_says_so_and_the_run_goes_on(
    tmp_path, monkeypatch, stated, blocks
):
    """Where its part is planned it gets a lighter one, where it is stated it is left out."""
    others = {name: plan for name, plan in SETTINGS["plan"]["devices"].items() if name != "a"}
    own = {"a": {"split_layer": 1}} if stated else {}
    sim = Simulation(
        tmp_path,
        settings={
            **SETTINGS,
            "plan": {"batch": 4, "devices": {**others, **own}},
            "devices": {**USUAL, "min": 2, "expected": 3},
            "training": {"max_length": 48, "wire_dtype": "float32"},
        },
        model_changes={"n_layer": 4},
    )
    dictate(monkeypatch, sim)
    for name in "abc":
        sim.add_device(name, lines=LINES)
    sim.run_to("round 1, step 1")
    backend = sim.devices["a"].parts.backend
    load = backend.load

    def full(base, **terms):
        if base.split_layer > 2:
            raise PlanError("this device is out of memory")
        load(base, **terms)

    monkeypatch.setattr(backend, "load", full)
    sim.run_to("round 2, step 3")
    part = {m.device_id: m.plan.split_layer for m in sim.coordinator.members.registry}
    assert part.get("a", 0) == blocks
    error = sim.devices["a"].error
    assert (error is not None) == stated
    assert not stated or "out of memory" in str(error)
    sim.reporter.close()
