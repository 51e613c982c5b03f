"""Devices without torch beside devices with it: the run comes to what torch alone comes to.

The same run twice, through every message: once everybody computes with torch, once some or all
devices compute with onnx. What differs is the order of float32 sums, and what AdamW makes of it:
updates were measured to be up to 4e-5 apart with AdamW, and 2e-7 with SGD.
"""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.strategies import STRATEGIES
from shared.protocol.messages import (
    Assignment,
    EvaluationResult,
    GraphsRequest,
    JoinRequest,
    PieceRequest,
)
from tests.equivalence import test_changing_parts as changing
from tests.equivalence.test_classifying_system import system as classifying
from tests.equivalence.test_strategies import ALIKE, ANY_RANKS, UNEQUAL
from tests.support.closeness import relative
from tests.support.graph_files import put_in_cache
from tests.support.outcomes import (
    LINES,
    PLANS,
    TOLERANCE,
    USUAL,
    backend_of,
    difference,
    outcome_of,
    trio,
)
from tests.support.planned import planned
from tests.support.simulation import Simulation
from tests.support.traffic import messages, sent

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

LOSSES_APART = 1e-6
"""Relative, of any step: 2e-8 is the most that was measured."""


def assert_alike(light, heavy, *, tolerance):
    """Both have finished: their updates, held-out perplexities and losses are the same."""
    mine, its = outcome_of(light), outcome_of(heavy)
    assert difference(mine, its) <= tolerance
    np.testing.assert_allclose(mine.losses, its.losses, rtol=LOSSES_APART)
    assert all(one.error is None for one in light.devices.values())


def assert_computed_without_torch(sim, devices):
    """These devices, and nobody else, asked for graphs; and nothing had to be exported."""
    joined = {one.profile.backend for one in sent(sim.broker.traffic, JoinRequest)}
    assert joined == ({"onnx"} if len(devices) == len(sim.devices) else {"onnx", "torch"})
    asked = sent(sim.broker.traffic, GraphsRequest)
    assert len(asked) == len(devices)
    assert sim.graphs.export is None


@pytest.mark.parametrize(
    ("labels", "hand_back", "devices"),
    [
        ("device", "residual", "bc"),
        ("device", "merge", "a"),
        ("device", "merge", "abc"),
        ("server", "residual", "abc"),
        ("server", "merge", "bc"),
    ],
)
def test_whoever_computes_without_torch_the_run_comes_to_the_same(
    labels, hand_back, devices, tmp_path
):
    settings = {"labels": labels, "hand_back": hand_back}
    heavy = trio(tmp_path / "torch", **settings)
    light = trio(tmp_path / devices, without_torch=devices, **settings)
    for sim in (heavy, light):
        sim.run()
    assert_computed_without_torch(light, devices)
    assert_alike(light, heavy, tolerance=TOLERANCE["adamw"])


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_a_device_that_holds_everything_may_be_without_torch(optimizer, tmp_path):
    plans = {**PLANS, "c": {"split_layer": 4, "r": 6}}
    light, heavy = (
        trio(tmp_path / (who or "torch"), plans=plans, optimizer=optimizer, without_torch=who)
        for who in ("ac", "")
    )
    for sim in (light, heavy):
        sim.run()
    assert_alike(light, heavy, tolerance=TOLERANCE[optimizer])


# --- strategies -----------------------------------------------------------------------------


def by_strategy(folder, strategy, *, without_torch=""):
    devices = UNEQUAL if strategy in ANY_RANKS else ALIKE
    cut = {"split_layer": 2} if strategy in ("hsplitlora", "splitlora") else {}
    sim = Simulation(
        folder,
        settings={
            "strategy": strategy,
            "rounds": {"count": 2, "steps": 2},
            "plan": {"batch": 3, "micro_batch": 2, "devices": devices, **cut},
            "devices": {"min": len(devices)},
            "lora": {"r": 4, "lora_alpha": 8.0, "target_modules": ["c_attn", "c_fc"]},
            "optimizer": {"learning_rate": 2e-2, "max_grad_norm": 0.0},
            "training": {"max_length": 48, "wire_dtype": "float32"},
        },
        model_changes={"n_layer": 4},
    )
    if without_torch:
        put_in_cache(sim.graphs)
    for device in devices:
        sim.add_device(device, lines=LINES, backend=backend_of(device, without_torch))
    sim.run()
    return sim


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_comes_to_the_same_in_a_mixed_fleet(strategy, tmp_path):
    light = by_strategy(tmp_path / "light", strategy, without_torch="bc")
    heavy = by_strategy(tmp_path / "heavy", strategy)
    assert_computed_without_torch(light, "bc")
    assert_alike(light, heavy, tolerance=TOLERANCE["adamw"])


# --- parts that change ----------------------------------------------------------------------


def with_changing_parts(folder, patch, *, without_torch=""):
    """Blocks are added, taken away, all of them held, ranks changed alone, by `CHANGES`."""
    sim = Simulation(
        folder,
        settings={
            **changing.SETTINGS,
            "training": {"max_length": 48, "wire_dtype": "float32"},
        },
        model_changes={"n_layer": 4},
    )
    changing.dictate(patch, sim)
    if without_torch:
        put_in_cache(sim.graphs)
    for device in "abc":
        sim.add_device(device, lines=LINES, backend=backend_of(device, without_torch))
    sim.run()
    return sim


def test_more_blocks_or_fewer_need_no_new_graphs(tmp_path, monkeypatch):
    light = with_changing_parts(tmp_path / "light", monkeypatch, without_torch="ab")
    heavy = with_changing_parts(tmp_path / "heavy", monkeypatch)
    assert_computed_without_torch(light, "ab")
    assert len(sent(light.broker.traffic, Assignment)) > 3 + 3
    graphs = {piece.sha256 for piece in light.graphs.found.pieces}
    fetched = [
        (one.address.device, one.message.sha256, one.message.offset)
        for one in messages(light.broker.traffic)
        if isinstance(one.message, PieceRequest) and one.message.sha256 in graphs
    ]
    assert len(set(fetched)) == len(fetched) >= 2 * (len(graphs) - 1), "each once"
    assert_alike(light, heavy, tolerance=TOLERANCE["adamw"])


def test_ranks_follow_from_importance_as_without_torch(tmp_path):
    settings = {"lora": {"r": 8, "target_modules": ["c_attn", "c_fc", "c_proj"]}}
    light, heavy = (
        planned(tmp_path / (who or "torch"), without_torch=who, **settings) for who in ("ac", "")
    )
    for sim in (light, heavy):
        sim.run()
    assert_computed_without_torch(light, "ac")
    probed = [one for one in sent(light.broker.traffic, EvaluationResult) if one.importance]
    assert len(probed) == 3 * 3
    mine, its = (sim.fleet.importance.scores for sim in (light, heavy))
    assert mine == pytest.approx(its, rel=1e-5)
    ranks, expected = (
        [one.ranks for one in sent(sim.broker.traffic, Assignment)] for sim in (light, heavy)
    )
    assert ranks == expected
    assert any(len(set(one.values())) > 1 for one in ranks), "importance must have moved them"
    assert_alike(light, heavy, tolerance=TOLERANCE["adamw"])


# --- classification -------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_classifier_is_learnt_as_without_torch(labels, tmp_path):
    plans = {"a": {"split_layer": 1, "r": 2}, "b": {"split_layer": 2, "r": 6}, "c": {}}
    ran = []
    for without_torch in ("ab", ""):
        sim = classifying(
            tmp_path / (without_torch or "torch"), "gpt2", devices=plans, labels=labels, steps=3
        )
        if without_torch:
            put_in_cache(sim.graphs)
        for device in plans:
            sim.add_device(device, lines=LINES, backend=backend_of(device, without_torch))
        sim.run()
        ran.append(sim)
    light, heavy = ran
    assert_computed_without_torch(light, "ab")
    for module, update in heavy.model.update.items():
        own = light.model.update[module].total.delta_OI()
        assert relative(own, update.total.delta_OI()) <= TOLERANCE["adamw"], module
    for name, weight in heavy.model.classifier.weights.items():
        assert relative(light.model.classifier.weights[name], weight) <= TOLERANCE["adamw"], name
    mine, its = ([one for one in sim.metrics() if "eval/loss" in one] for sim in ran)
    for key in ("eval/loss", "eval/accuracy", "eval/f1"):
        assert [m[key] for m in mine] == pytest.approx([i[key] for i in its], rel=1e-5), key


# --- who comes when -------------------------------------------------------------------------


def test_a_device_without_torch_may_join_in_the_middle(tmp_path):
    ran = []
    for without_torch in ("a", ""):
        rules = {**USUAL, "min": 2, "expected": 3}
        folder = tmp_path / (without_torch or "torch")
        sim = trio(folder, rules=rules, devices="bc", rounds=3, without_torch=without_torch)
        sim.run_to("round 2, step 2")
        sim.add_device("a", lines=LINES, backend=backend_of("a", without_torch))
        sim.run()
        ran.append(sim)
    light, heavy = ran
    assert_computed_without_torch(light, "a")
    assert outcome_of(light).tokens["a"] > 0
    assert_alike(light, heavy, tolerance=TOLERANCE["adamw"])
