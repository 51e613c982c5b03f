"""Law 1 of a classifier: one device, any split layer, either label mode: a monolithic PEFT run."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from shared.class_counts import counted
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.equivalence.test_importance_is_whole import probe
from tests.support.closeness import largest_difference, relative
from tests.support.dense_importance import dense_importance
from tests.support.monolithic import Trained, logits_of, summed_loss, train_whole
from tests.support.split_system import SplitSystem
from tests.support.tiny_models import (
    CLASSES,
    CLASSIFYING,
    FAMILIES,
    classified_batch,
    cut,
    fresh_adapters,
    tiny_classifier,
)

STEPS = 20
GATED = ("q_proj", "v_proj", "o_proj", "down_proj")
BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
TARGETS = {"gpt2": ("c_attn", "c_proj", "c_fc"), "bert": BERT, "roberta": BERT}
OPTIMIZERS = {
    "sgd": OptimizerTerms(name="sgd", learning_rate=0.03, max_grad_norm=0.0),
    "adamw": OptimizerTerms(name="adamw", learning_rate=3e-3, max_grad_norm=0.0),
}
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
LENGTHS = ((9, 4, 12), (7, 7, 7), (2, 13, 6), (3, 5, 11))


def lora_of(family):
    return LoraTerms(r=4, lora_alpha=8.0, target_modules=TARGETS.get(family, GATED))


def batches_of_run(family, steps=STEPS):
    architecture = tiny_classifier(family).architecture
    lengths = [LENGTHS[step % len(LENGTHS)] for step in range(steps)]
    return [classified_batch(own, architecture, seed=step) for step, own in enumerate(lengths)]


def system_of(family, folder, *, split_layer, labels, optimizer, backend="torch"):
    training = TrainingTerms(
        task="classification",
        classes=CLASSES,
        labels=labels,
        wire_dtype="float32",
        max_length=16,
        total_steps=STEPS,
    )
    return SplitSystem(
        tiny_classifier(family),
        {"nano": split_layer},
        folder,
        training=training,
        lora=lora_of(family),
        optimizer=OPTIMIZERS[optimizer],
        backends={"nano": backend},
    )


def split_run(family, folder, **choices):
    system = system_of(family, folder, **choices)
    losses = [
        system.step(n, {"nano": list(cut(batch, 2))})
        for n, batch in enumerate(batches_of_run(family))
    ]
    ((_, classifier),) = system.classifiers().items()
    adapters = {module: pair for (_, module), pair in system.adapters().items()}
    return Trained(tuple(losses), adapters, dict(classifier))


@cache
def whole_run(family, optimizer):
    model, batches = tiny_classifier(family), batches_of_run(family)
    return train_whole(model, batches, lora=lora_of(family), optimizer=OPTIMIZERS[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("split_layer", [1, 2, 3])
@pytest.mark.parametrize("family", CLASSIFYING)
def test_a_split_classifier_equals_the_monolithic_one(
    family, split_layer, labels, optimizer, tmp_path
):
    split = split_run(family, tmp_path, split_layer=split_layer, labels=labels, optimizer=optimizer)
    whole = whole_run(family, optimizer)
    assert largest_difference(split.adapters, whole.adapters) <= TOLERANCE[optimizer]
    assert split.classifier.keys() == whole.classifier.keys()
    for name, weight in whole.classifier.items():
        assert relative(split.classifier[name], weight) <= TOLERANCE[optimizer], name
    np.testing.assert_allclose(split.losses, whole.losses, rtol=TOLERANCE[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", CLASSIFYING)
def test_the_yardstick_run_moves_every_weight_that_is_trained(family, optimizer):
    start, end = tiny_classifier(family).classifier, whole_run(family, optimizer).classifier
    moved = [relative(end[name], weight) for name, weight in start.items()]
    assert min(moved) > 100 * TOLERANCE[optimizer]


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("split_layer", [1, 3])
@pytest.mark.parametrize("family", ["qwen3", "bert", "roberta"])
def test_an_evaluation_has_the_loss_and_the_choices_of_the_whole_model(
    family, split_layer, labels, tmp_path
):
    model = tiny_classifier(family)
    system = system_of(family, tmp_path, split_layer=split_layer, labels=labels, optimizer="sgd")
    # Nothing is adapted yet that changes an output: B counts, so the whole model gets it too.
    (batch,) = batches_of_run(family, 1)
    split, counts = system.evaluate_with_counts("nano", batch)
    whole = peft_like(model, system)
    with torch.no_grad():
        expected, logits = float(summed_loss(whole, batch)), logits_of(whole, batch)
    assert split == pytest.approx(expected, rel=1e-5)
    actual = batch.labels[batch.labels >= 0].tolist()
    assert counts == counted(actual, logits.argmax(dim=1).tolist(), classes=len(CLASSES))


def peft_like(model, system):
    """Return the whole model with all adapters of the system added to its weights."""
    whole = model.hugging_face()
    for (_, module), pair in system.adapters().items():
        delta_OI = torch.from_numpy(pair.delta_OI()).float()
        weight = whole.get_submodule(module).weight
        weight.data += delta_OI.t() if model.config["model_type"] == "gpt2" else delta_OI
    return whole


@pytest.mark.parametrize("family", [FAMILIES[0], "bert"])
def test_the_head_on_a_device_is_sent_one_row_of_each_sequence(family, tmp_path):
    """All that a classifier reads; a model of words needs them all."""
    from edge_agent.backends.base import MicroBatch

    system = system_of(family, tmp_path, split_layer=1, labels="device", optimizer="sgd")
    (batch,) = batches_of_run(family, 1)
    hidden = system.train_hidden("nano", MicroBatch(0, 0), batch)
    assert hidden.shape == (len(batch.lengths), 32)


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("split_layer", [1, 3])
@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_importance_is_what_dense_gradients_of_the_whole_classifier_give(
    family, split_layer, labels, tmp_path
):
    one = system_of(family, tmp_path, split_layer=split_layer, labels=labels, optimizer="sgd")
    before = {name: dict(weights) for name, weights in one.classifiers().items()}
    batches = batches_of_run(family, 3)
    found = probe(one, "nano", batches)
    if one.server is not None:
        found |= {m: measured.magnitude for m, measured in one.server.probe.take().items()}
    model = tiny_classifier(family)
    adapters = fresh_adapters(model.architecture, lora_of(family), blocks=range(3))
    dense = dense_importance(model, adapters, batches)
    assert found.keys() >= {m for m in adapters if model.architecture.block_of(m) < split_layer}
    for module, value in found.items():
        assert value == pytest.approx(dense[module], rel=1e-4), module
    for name, weights in one.classifiers().items():
        for tensor, weight in weights.items():
            np.testing.assert_array_equal(weight, before[name][tensor])
    learnt = [b.step(0, target_tokens=9) for b in one.devices.values()]
    assert learnt == [0.0], "a probe teaches nothing, the classifier included"
