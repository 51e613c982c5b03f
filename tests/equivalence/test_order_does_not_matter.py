"""Law 2: any arrival order and any micro-batching of a step gives the same adapters."""

from __future__ import annotations

import random

import pytest

from edge_agent.backends.base import MicroBatch
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.closeness import largest_difference
from tests.support.split_system import SplitSystem, tokens_of
from tests.support.tiny_models import cut, tiny_batch, tiny_model

STEPS = 6
LENGTHS = {"nano": (9, 4, 12, 6), "orin": (5, 11, 7, 3)}
SPLIT_LAYERS = {"nano": 1, "orin": 2}
TERMS = {
    "sgd": OptimizerTerms(name="sgd", learning_rate=0.3, max_grad_norm=0.05),
    "adamw": OptimizerTerms(name="adamw", learning_rate=3e-3, max_grad_norm=0.05),
}
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}


def two_devices(folder, *, labels, optimizer):
    return SplitSystem(
        tiny_model("gpt2"),
        SPLIT_LAYERS,
        folder,
        training=TrainingTerms(
            labels=labels, wire_dtype="float32", max_length=16, total_steps=STEPS
        ),
        lora=LoraTerms(r=4, target_modules=("c_attn", "c_fc")),
        optimizer=TERMS[optimizer],
    )


def work_of(step, *, micro_batch):
    return {
        device: list(cut(tiny_batch(lengths, seed=step), micro_batch))
        for device, lengths in LENGTHS.items()
    }


def in_turn(folder, *, labels, optimizer):
    system = two_devices(folder, labels=labels, optimizer=optimizer)
    for step in range(STEPS):
        system.step(step, work_of(step, micro_batch=4))
    return system.adapters()


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("optimizer", TERMS)
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batching_and_arrival_do_not_matter(micro_batch, optimizer, labels, tmp_path):
    system = two_devices(tmp_path, labels=labels, optimizer=optimizer)
    order = random.Random(7)
    for step in range(STEPS):
        work = work_of(step, micro_batch=micro_batch)
        sent = [
            (device, MicroBatch(step, index), system.forward(device, MicroBatch(step, index), b))
            for device, batches in work.items()
            for index, b in enumerate(batches)
        ]
        order.shuffle(sent)
        for device, key, message in sent:
            system.finish(device, key, message)
        system.close(step, {device: tokens_of(batches) for device, batches in work.items()})
    expected = in_turn(tmp_path, labels=labels, optimizer=optimizer)
    assert largest_difference(system.adapters(), expected) <= TOLERANCE[optimizer]


def test_head_gradients_may_come_back_in_any_order(tmp_path):
    """With labels on the device, all micro-batches of a step may be open at once."""
    system = two_devices(tmp_path, labels="device", optimizer="sgd")
    order = random.Random(3)
    for step in range(STEPS):
        work = work_of(step, micro_batch=2)
        jobs = [
            (device, MicroBatch(step, index), batch)
            for device, batches in work.items()
            for index, batch in enumerate(batches)
        ]
        finish_out_of_order(system, jobs, order)
        system.close(step, {device: tokens_of(batches) for device, batches in work.items()})
    expected = in_turn(tmp_path, labels="device", optimizer="sgd")
    assert largest_difference(system.adapters(), expected) <= TOLERANCE["sgd"]


def finish_out_of_order(system, jobs, order):
    gradients = []
    for device, key, batch in jobs:
        hidden = system.train_hidden(device, key, batch)
        _, gradient = system.devices[device].head(key, hidden, train=True)
        gradients.append((device, key, gradient))
    assert system.server.open_micro_batches == len(jobs)
    order.shuffle(gradients)
    for device, key, gradient in gradients:
        system.train_back(device, key, gradient)
    assert system.server.open_micro_batches == 0
