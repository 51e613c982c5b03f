"""Law 1: one device, any split layer, either label mode: the same as a monolithic PEFT run."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.closeness import largest_difference
from tests.support.monolithic import Trained, train_whole
from tests.support.split_system import SplitSystem
from tests.support.tiny_models import FAMILIES, fresh_adapters, tiny_batch, tiny_model

STEPS = 20
TARGETS = {"gpt2": ("c_attn", "c_proj", "c_fc")}
GATED_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
OPTIMIZERS = {
    "sgd": OptimizerTerms(name="sgd", learning_rate=0.3, max_grad_norm=0.0),
    "adamw": OptimizerTerms(name="adamw", learning_rate=3e-3, max_grad_norm=0.0),
}
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
LENGTHS = ((9, 4, 12), (7, 7, 7), (1, 13, 6), (3, 5, 11))


def lora_of(family):
    return LoraTerms(
        r=4,
        lora_alpha=8.0,
        target_modules=TARGETS.get(family, GATED_TARGETS),
        rank_pattern={"1.attn.c_proj": 2, "layers.1.self_attn.v_proj": 2},
        alpha_pattern={"c_fc": 3.0, "k_proj": 3.0},
    )


def batches_of_run():
    lengths = [LENGTHS[step % len(LENGTHS)] for step in range(STEPS)]
    return [tiny_batch(own, seed=step, prompt=0) for step, own in enumerate(lengths)]


def split_run(family, folder, *, split_layer, labels, optimizer, backend="torch"):
    training = TrainingTerms(labels=labels, wire_dtype="float32", max_length=16, total_steps=STEPS)
    system = SplitSystem(
        tiny_model(family),
        {"nano": split_layer},
        folder,
        training=training,
        lora=lora_of(family),
        optimizer=optimizer,
        backends={"nano": backend},
    )
    losses = [system.step(n, {"nano": [batch]}) for n, batch in enumerate(batches_of_run())]
    adapters = {module: pair for (_, module), pair in system.adapters().items()}
    return Trained(tuple(losses), adapters)


@cache
def whole_run(family, optimizer, clip_at=None):
    terms = OPTIMIZERS[optimizer] if clip_at is None else clipped(optimizer)
    return train_whole(
        tiny_model(family),
        batches_of_run(),
        lora=lora_of(family),
        optimizer=terms,
        clip_at=clip_at,
    )


def clipped(optimizer):
    rate = {"sgd": 3.0, "adamw": 3e-3}[optimizer]
    return OptimizerTerms(name=optimizer, learning_rate=rate, max_grad_norm=0.02)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("split_layer", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_run_equals_the_monolithic_one(family, split_layer, labels, optimizer, tmp_path):
    terms = OPTIMIZERS[optimizer]
    split = split_run(family, tmp_path, split_layer=split_layer, labels=labels, optimizer=terms)
    whole = whole_run(family, optimizer)
    assert largest_difference(split.adapters, whole.adapters) <= TOLERANCE[optimizer]
    np.testing.assert_allclose(split.losses, whole.losses, rtol=TOLERANCE[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_each_side_clips_its_own_adapters(family, optimizer, tmp_path):
    terms = clipped(optimizer)
    split = split_run(family, tmp_path, split_layer=2, labels="device", optimizer=terms)
    whole = whole_run(family, optimizer, clip_at=2)
    assert largest_difference(split.adapters, whole.adapters) <= TOLERANCE[optimizer]
    assert largest_difference(split.adapters, whole_run(family, optimizer).adapters) > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_yardstick_run_moves_every_adapter(family, optimizer):
    model = tiny_model(family)
    start = fresh_adapters(model.architecture, lora_of(family), blocks=range(3))
    end = whole_run(family, optimizer).adapters
    moved = [largest_difference({0: end[m]}, {0: start[m].trainable}) for m in start]
    assert min(moved) > 100 * TOLERANCE[optimizer]
