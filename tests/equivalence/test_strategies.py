"""Every strategy is its paper's method, in the whole system.

Three devices of unequal ranks (of equal ones where the method wants that), several rounds; what
they deliver, what comes of it and what they are handed back, against dense matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation import Aggregated, Contribution
from coordinator.strategies import STRATEGIES
from shared.adapters import AdapterState, Array, LoraPair
from tests.equivalence.test_system_is_whole import (
    batches_of,
    first_adapters,
    monolithic_model,
    peft_run,
)
from tests.support.closeness import relative
from tests.support.monolithic import train_whole
from tests.support.outcomes import LINES, TOLERANCE
from tests.support.simulation import Simulation
from tests.support.spies import Held, watch_hand_backs

TARGETS = ["c_attn", "c_fc"]
UNEQUAL = {"a": {"r": 2}, "b": {"r": 4}, "c": {"r": 8}}
ALIKE: Mapping[str, Any] = {"a": {}, "b": {}, "c": {}}
ANY_RANKS = ("hlora", "hetlora", "flora")


@dataclass(frozen=True)
class Round:
    """What devices delivered in a round, and what came of it."""

    contributions: tuple[Contribution, ...]
    aggregated: Aggregated

    def delivered(self) -> dict[str, AdapterState]:
        return {one.device: one.adapters for one in self.contributions if one.adapters is not None}

    def weights(self) -> dict[str, float]:
        total = sum(one.target_tokens for one in self.contributions)
        return {one.device: one.target_tokens / total for one in self.contributions}

    def dense_mean(self, module: str) -> Array:
        """Return Σ p_i s_i B_i A_i."""
        weights = self.weights()
        return sum(weights[d] * pairs[module].delta_OI() for d, pairs in self.delivered().items())


@dataclass(frozen=True)
class Ran:
    """A finished run, seen from outside."""

    sim: Simulation
    seen: list[Held]
    rounds: list[Round]

    def received(self, device: str, *, after: int) -> Mapping[str, LoraPair]:
        """Return the trainable pairs that a device was handed after round ``after``."""
        (held,) = [one for one in self.seen if (one.holder, one.round) == (device, after + 1)]
        assert all(one.frozen is None for one in held.received.values())
        return {module: one.trainable for module, one in held.received.items()}

    def weights_of(self, device: str, *, after: int) -> Mapping[str, Array]:
        (held,) = [one for one in self.seen if (one.holder, one.round) == (device, after + 1)]
        return held.weights


def run(
    folder: Any,
    patch: pytest.MonkeyPatch,
    strategy: str,
    *,
    devices: Mapping[str, Any],
    rounds: int = 2,
    steps: int = 2,
    optimizer: str = "adamw",
    labels: str = "device",
    plan: Mapping[str, Any] | None = None,
) -> Ran:
    sim = Simulation(
        folder,
        settings={
            "strategy": strategy,
            "rounds": {"count": rounds, "steps": steps},
            "plan": {"batch": 3, "micro_batch": 2, "devices": devices, **(plan or {})},
            "devices": {"min": len(devices)},
            "lora": {"r": 4, "lora_alpha": 8.0, "target_modules": TARGETS},
            "optimizer": {
                "name": optimizer,
                "learning_rate": {"sgd": 0.3, "adamw": 2e-2}[optimizer],
                "max_grad_norm": 0.0,
            },
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
        },
    )
    seen = watch_hand_backs(patch, sim)
    finish, finished = sim.model.finish_round, []

    def spied(contributions):
        aggregated = finish(contributions)
        finished.append(Round(tuple(contributions), aggregated))
        return aggregated

    patch.setattr(sim.model, "finish_round", spied)
    for device in devices:
        sim.add_device(device, lines=LINES)
    sim.run()
    assert len(finished) == rounds
    return Ran(sim, seen, finished)


@pytest.fixture(scope="module", params=STRATEGIES)
def ran(request, tmp_path_factory):
    """Two rounds of three devices by each strategy."""
    devices: Mapping[str, Any] = UNEQUAL if request.param in ANY_RANKS else ALIKE
    plan = {"split_layer": 2} if request.param in ("hsplitlora", "splitlora") else {}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp(request.param)
        return request.param, run(folder, patch, request.param, devices=devices, plan=plan)


def test_every_strategy_learns_and_says_what_its_aggregation_lost(ran):
    strategy, one = ran
    evaluated = [line["eval/perplexity"] for line in one.sim.metrics() if "eval/perplexity" in line]
    assert len(evaluated) == 3
    assert evaluated[-1] < evaluated[0]
    errors = [
        line["aggregation/error"] for line in one.sim.metrics() if "aggregation/error" in line
    ]
    assert errors == [each.aggregated.error for each in one.rounds]
    if strategy in ("hsplitlora", "flora", "ffa-lora"):
        assert max(errors) <= 1e-6
    else:
        assert min(errors) > 1e-3


def test_the_reported_error_is_that_of_what_devices_are_handed(ran):
    strategy, one = ran
    if strategy in ("hsplitlora", "flora"):
        return  # exact: law 3 and law 4 look at these
    for number, each in enumerate(one.rounds, start=1):
        modules = [m for m in each.aggregated.update if m in one.received("a", after=number)]
        lost = size = 0.0
        for module in modules:
            exact = each.dense_mean(module)
            size += np.linalg.norm(exact) ** 2
            for device, weight in each.weights().items():
                got = one.received(device, after=number)[module].delta_OI()
                lost += weight * np.linalg.norm(got - exact) ** 2
        if strategy == "splitlora":  # the server's modules, which only it holds, lose nothing
            back = each.aggregated.update.keys() - set(modules)
            size += sum(each.aggregated.update[m].total.norm ** 2 for m in back)
        assert each.aggregated.error == pytest.approx(np.sqrt(lost / size), rel=1e-4, abs=1e-6)


def test_without_a_cut_nothing_but_adapters_travels(ran):
    strategy, one = ran
    lines = [line for line in one.sim.metrics() if "train/loss" in line]
    assert bool(lines) == (STRATEGIES[strategy].cut != "none"), "the server took steps of its own"


def test_hlora_hands_back_the_dense_svd(tmp_path, monkeypatch):
    one = run(tmp_path, monkeypatch, "hlora", devices=UNEQUAL, rounds=3)
    for number, each in enumerate(one.rounds, start=1):
        for module in each.aggregated.update:
            u, s, vt = np.linalg.svd(each.dense_mean(module), full_matrices=False)
            for device, terms in UNEQUAL.items():
                rank = terms["r"]
                expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
                got = one.received(device, after=number)[module]
                assert got.rank == rank
                assert relative(got.delta_OI(), expected) <= 1e-6


def test_flora_merges_the_dense_sum_into_everybodys_base(tmp_path, monkeypatch):
    one = run(tmp_path, monkeypatch, "flora", devices=UNEQUAL, rounds=3)
    base = one.weights_of("a", after=0)
    total = {module: np.zeros_like(weight) for module, weight in base.items()}
    for number, each in enumerate(one.rounds, start=1):
        for module in each.aggregated.update:
            total[module] = total[module] + each.dense_mean(module)
        for device in UNEQUAL:
            weights = one.weights_of(device, after=number)
            for module, weight in weights.items():
                assert relative(weight, base[module] + total[module]) <= 1e-6, module
            (held,) = [s for s in one.seen if (s.holder, s.round) == (device, number + 1)]
            assert not any(p.trainable.b_OR.any() for p in held.received.values()), "starts anew"


def test_hetlora_pads_weighs_by_norm_and_truncates(tmp_path, monkeypatch):
    one = run(tmp_path, monkeypatch, "hetlora", devices=UNEQUAL)
    for number, each in enumerate(one.rounds, start=1):
        for module in each.aggregated.update:
            pairs = {device: adapters[module] for device, adapters in each.delivered().items()}
            norms = {device: np.linalg.norm(p.delta_OI()) for device, p in pairs.items()}
            weights = {device: norm / sum(norms.values()) for device, norm in norms.items()}
            rank, inputs, outputs = 8, pairs["c"].a_RI.shape[1], pairs["c"].b_OR.shape[0]
            a_RI, b_OR = np.zeros((rank, inputs)), np.zeros((outputs, rank))
            for device, pair in pairs.items():
                a_RI[: pair.rank] += weights[device] * pair.a_RI
                b_OR[:, : pair.rank] += weights[device] * pair.scaling * pair.b_OR
            for device, terms in UNEQUAL.items():
                got = one.received(device, after=number)[module]
                own = terms["r"]
                assert relative(got.a_RI, a_RI[:own]) <= 1e-6
                assert relative(got.scaling * got.b_OR, b_OR[:, :own]) <= 1e-6


def test_fedlora_after_one_step_of_sgd_is_the_average_by_hand(tmp_path, monkeypatch):
    devices: Mapping[str, Any] = {"a": {}, "b": {"batch": 5}}
    one = run(tmp_path, monkeypatch, "fedlora", devices=devices, rounds=1, steps=1, optimizer="sgd")
    start = first_adapters(one.seen)
    for module, pair in start["a"].items():
        np.testing.assert_array_equal(pair.a_RI, start["b"][module].a_RI)
    trained, tokens = {}, {}
    for device in devices:
        data = one.sim.devices[device].agent._participation._data
        size = 5 if device == "b" else 3
        (batch,) = data.micro_batches(0, batch=size, micro_batch=size)
        tokens[device] = batch.target_tokens
        trained[device] = train_whole(
            monolithic_model("gpt2"),
            [batch],
            lora=one.sim.config.lora,
            optimizer=one.sim.config.optimizer,
            start=start[device],
        ).adapters
    share = {device: count / sum(tokens.values()) for device, count in tokens.items()}
    assert 0.3 < share["a"] < 0.45
    for module in start["a"]:
        a_RI = sum(share[d] * trained[d][module].a_RI for d in devices)
        b_OR = sum(share[d] * trained[d][module].b_OR for d in devices)
        for device in devices:
            got = one.received(device, after=1)[module]
            assert relative(got.a_RI, a_RI) <= TOLERANCE["sgd"]
            assert relative(got.b_OR, b_OR) <= TOLERANCE["sgd"]


@pytest.mark.parametrize(("labels", "optimizer"), [("device", "adamw"), ("server", "sgd")])
def test_splitlora_with_one_device_is_a_peft_run(labels, optimizer, tmp_path, monkeypatch):
    one = run(
        tmp_path,
        monkeypatch,
        "splitlora",
        devices={"a": {}},
        plan={"split_layer": 2},
        steps=10,
        labels=labels,
        optimizer=optimizer,
    )
    first = first_adapters(one.seen)
    start = {module: pair for held in first.values() for module, pair in held.items()}
    whole = peft_run(one.sim, "a", start)
    for module, pair in whole.adapters.items():
        apart = relative(one.sim.model.update[module].total.delta_OI(), pair.delta_OI())
        assert apart <= TOLERANCE[optimizer], module
    tokens = [batch.target_tokens for batch in batches_of(one.sim, "a", 20)]
    losses = [line["train/loss"] for line in one.sim.metrics() if "train/loss" in line]
    np.testing.assert_allclose(losses, np.divide(whole.losses, tokens), rtol=TOLERANCE[optimizer])


def test_ffa_lora_never_moves_a(tmp_path, monkeypatch):
    one = run(tmp_path, monkeypatch, "ffa-lora", devices=ALIKE, rounds=3)
    first = first_adapters(one.seen)["a"]
    for each in one.rounds:
        for adapters in each.delivered().values():
            for module, pair in adapters.items():
                np.testing.assert_allclose(pair.a_RI, first[module].a_RI, rtol=1e-6)
                assert pair.b_OR.any()
    for module, update in one.sim.model.update.items():
        assert relative(update.total.delta_OI(), one.rounds[-1].dense_mean(module)) <= 1e-6


@pytest.mark.parametrize("strategy", ["hlora", "hetlora", "splitlora", "ffa-lora"])
def test_a_coordinator_that_restarts_goes_on_as_if_nothing_had_been(
    strategy, tmp_path, monkeypatch
):
    devices: Mapping[str, Any] = UNEQUAL if strategy in ANY_RANKS else ALIKE
    plan = {"split_layer": 2} if strategy == "splitlora" else {}
    whole = run(tmp_path / "whole", monkeypatch, strategy, devices=devices, plan=plan, rounds=3)
    sim = Simulation(tmp_path / "torn", settings=whole.sim.settings)
    for device in devices:
        sim.add_device(device, lines=LINES)
    sim.run(until=lambda: sim.coordinator._next_round == 2)
    sim.restart_coordinator()
    sim.run()
    for module, update in whole.sim.model.update.items():
        again = sim.model.update[module].total.delta_OI()
        assert relative(again, update.total.delta_OI()) <= 1e-5, module
