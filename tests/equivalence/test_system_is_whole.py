"""Laws 1 and 5 in the whole system: through every message, round and hand-back.

One device, two rounds of ten steps: the global update is what an ordinary PEFT run of twenty
steps on the same batches makes of the same initial adapters.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import torch

from coordinator.export import export_adapter
from coordinator.model_card import ModelCard
from edge_agent.backends.base import TokenBatch
from shared.adapters import LoraPair
from tests.support.closeness import relative
from tests.support.monolithic import summed_loss, train_whole
from tests.support.outcomes import LINES, TOLERANCE
from tests.support.simulation import Simulation
from tests.support.spies import watch_hand_backs
from tests.support.tiny_models import FAMILIES, tiny_model
from tests.support.traffic import messages
from tests.support.vocabularies import byte_level

ROUNDS, STEPS = 2, 10
BLOCKS = 3
LEARNING_RATE = {"sgd": 0.3, "adamw": 3e-3}
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
GATED_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def system(
    folder,
    family,
    *,
    devices,
    optimizer,
    labels="device",
    hand_back="residual",
    rounds=ROUNDS,
    steps=STEPS,
):
    return Simulation(
        folder,
        family,
        settings={
            "rounds": {"count": rounds, "steps": steps},
            "plan": {"batch": 3, "micro_batch": 2, "devices": devices},
            "devices": {"min": len(devices)},
            "lora": {
                "r": 4,
                "lora_alpha": 8.0,
                "target_modules": TARGETS.get(family, GATED_TARGETS),
                "rank_pattern": {"1.attn.c_proj": 2, "layers.1.self_attn.v_proj": 2},
                "alpha_pattern": {"c_fc": 3.0, "k_proj": 3.0},
            },
            "optimizer": {
                "name": optimizer,
                "learning_rate": LEARNING_RATE[optimizer],
                "max_grad_norm": 0.0,
            },
            "aggregation": {"hand_back": hand_back},
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
        },
    )


def batches_of(sim, device, steps):
    """Return the device's batches of the run, each as one."""
    data = sim.devices[device].agent._participation._data
    return [joined(data.micro_batches(3 * step, batch=3, micro_batch=2)) for step in range(steps)]


def joined(parts):
    types = [part.token_types for part in parts if part.token_types is not None]
    return TokenBatch(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        tuple(length for part in parts for length in part.lengths),
        np.concatenate(types) if types else None,
    )


def first_adapters(seen):
    """Return what each holder began the run with."""
    first = {}
    for held in seen:
        pairs = {module: one.trainable for module, one in held.received.items()}
        first.setdefault(held.holder, pairs)
    return first


@pytest.fixture
def one_device_run(tmp_path, monkeypatch):
    """Return a function that gives a finished run, and the adapters that it began with."""

    def run(family, split_layer, **settings):
        sim = system(tmp_path, family, devices={"a": {"split_layer": split_layer}}, **settings)
        seen = watch_hand_backs(monkeypatch, sim)
        sim.add_device("a", lines=LINES)
        sim.run()
        return sim, {m: pair for held in first_adapters(seen).values() for m, pair in held.items()}

    return run


@cache
def monolithic_model(family):
    return tiny_model(family, vocab_size=byte_level().get_vocab_size())


def peft_run(sim, device, start, *, steps=ROUNDS * STEPS):
    return train_whole(
        monolithic_model(sim.family),
        batches_of(sim, device, steps),
        lora=sim.config.lora,
        optimizer=sim.config.optimizer,
        start=start,
    )


@pytest.mark.parametrize(
    ("split_layer", "labels", "optimizer"),
    [
        (1, "device", "sgd"),
        (2, "device", "adamw"),
        (BLOCKS, "device", "sgd"),
        (1, "server", "adamw"),
        (2, "server", "sgd"),
        (BLOCKS, "server", "adamw"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_device_through_the_whole_protocol_equals_a_peft_run(
    family, split_layer, labels, optimizer, one_device_run
):
    sim, start = one_device_run(family, split_layer, labels=labels, optimizer=optimizer)
    whole = peft_run(sim, "a", start)
    assert whole.adapters.keys() == sim.model.update.keys()
    for module, pair in whole.adapters.items():
        apart = relative(sim.model.update[module].total.delta_OI(), pair.delta_OI())
        assert apart <= TOLERANCE[optimizer], module
    tokens = [batch.target_tokens for batch in batches_of(sim, "a", ROUNDS * STEPS)]
    expected = np.divide(whole.losses, tokens)
    if split_layer == BLOCKS and labels == "device":
        rounds = [line["round/train_loss"] for line in sim.metrics() if "round/train_loss" in line]
        nats, tokens = (np.reshape(x, (ROUNDS, STEPS)).sum(axis=1) for x in (whole.losses, tokens))
        np.testing.assert_allclose(rounds, nats / tokens, rtol=TOLERANCE[optimizer])
    else:
        losses = [line["train/loss"] for line in sim.metrics() if "train/loss" in line]
        np.testing.assert_allclose(losses, expected, rtol=TOLERANCE[optimizer])


@pytest.mark.parametrize(
    ("family", "hand_back", "labels"),
    [("gpt2", "residual", "device"), ("gpt2", "merge", "server"), ("qwen3", "merge", "device")],
)
def test_the_exported_adapter_has_the_loss_of_the_last_evaluation(
    family, hand_back, labels, tmp_path
):
    plans = {"a": {"split_layer": 1, "r": 2}, "b": {"split_layer": 2, "r": 6}, "c": {}}
    settings = {"labels": labels, "hand_back": hand_back, "optimizer": "adamw", "steps": 3}
    sim = system(tmp_path, family, devices=plans, **settings)
    for device in plans:
        sim.add_device(device, lines=LINES)
    sim.run()
    card = ModelCard(
        base_model="tiny", run_id="sim", strategy="hsplitlora", hand_back=hand_back, labels=labels,
        rounds=ROUNDS, steps=6, devices=(), perplexity_before=2.0, perplexity_after=1.0,
    )  # fmt: skip
    folder = tmp_path / "adapter"
    adapter = export_adapter(sim.model.update, sim.config.model.name, folder, card=card)
    nats, tokens = held_out_loss(sim, opened(sim.config.model.name, adapter))
    last = [line for line in sim.metrics() if "eval/loss" in line]
    assert nats / tokens == pytest.approx(last[-1]["eval/loss"], rel=1e-4)
    assert last[-1]["eval/loss"] < last[0]["eval/loss"] - 1e-2, "nothing was learnt"


def opened(base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' own deprecations
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(plain, str(adapter)).eval()


def held_out_loss(sim, model):
    nats, tokens = 0.0, 0
    for device in sim.devices.values():
        for batch in device.agent._participation._data.evaluation_batches(16):
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nats += float(summed_loss(model, batch))
            tokens += batch.target_tokens
    return nats, tokens


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_devices_that_hold_the_whole_model_are_averaged_and_send_no_activations(
    optimizer, tmp_path, monkeypatch
):
    """The federated case: the mean by target tokens of adapters that were trained apart."""
    plans = {"a": {"split_layer": BLOCKS}, "b": {"split_layer": BLOCKS}}
    sim = system(tmp_path, "llama", optimizer=optimizer, rounds=1, devices=plans)
    seen = watch_hand_backs(monkeypatch, sim)
    for device in plans:
        sim.add_device(device, lines=LINES)
    sim.run()
    kinds = {one.address.kind for one in messages(sim.broker.traffic)}
    assert kinds - {"telemetry"} == {"requests", "commands", "weights", "handback", "adapter"}
    assert sim.model.trainer is None
    tokens = {d: sum(b.target_tokens for b in batches_of(sim, d, STEPS)) for d in plans}
    assert dict(sim.reporter.tallies.target_tokens) == tokens
    share = {device: count / sum(tokens.values()) for device, count in tokens.items()}
    start = first_adapters(seen)
    apart = {device: peft_run(sim, device, start[device], steps=STEPS) for device in plans}
    for module, update in sim.model.update.items():
        pairs: dict[str, LoraPair] = {d: one.adapters[module] for d, one in apart.items()}
        mean = sum(share[device] * pair.delta_OI() for device, pair in pairs.items())
        assert relative(update.total.delta_OI(), mean) <= TOLERANCE[optimizer], module
