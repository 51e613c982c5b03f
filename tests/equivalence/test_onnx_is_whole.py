"""Law 1 without torch on the device: a graph's device trains as PEFT does, and as torch's does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_agent.backends.base import MicroBatch
from edge_agent.backends.dropout_masks import DropoutMasks
from shared.adapters import LoraPair
from shared.modeling import lora as torch_lora
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.equivalence import test_classifier_is_whole as classifying
from tests.equivalence.test_split_is_whole import (
    LENGTHS,
    OPTIMIZERS,
    STEPS,
    TOLERANCE,
    lora_of,
    split_run,
    whole_run,
)
from tests.support.closeness import largest_difference, relative
from tests.support.graph_files import ALL_LINEAR
from tests.support.split_system import SplitSystem
from tests.support.tiny_models import FAMILIES, tiny_batch, tiny_model

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

CASES = [
    (family, split_layer, labels)
    for family in ("gpt2", "llama", "qwen2")
    for split_layer in (1, 2, 3)
    for labels in ("device", "server")
]
CASES.append(("qwen3", 2, "device"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("family", "split_layer", "labels"), CASES)
def test_a_run_without_torch_on_the_device_equals_the_monolithic_one(
    family, split_layer, labels, optimizer, tmp_path
):
    split = split_run(
        family,
        tmp_path,
        split_layer=split_layer,
        labels=labels,
        optimizer=OPTIMIZERS[optimizer],
        backend="onnx",
    )
    whole = whole_run(family, optimizer)
    assert largest_difference(split.adapters, whole.adapters) <= TOLERANCE[optimizer]
    np.testing.assert_allclose(split.losses, whole.losses, rtol=TOLERANCE[optimizer])


# --- against the torch agent ----------------------------------------------------------------

RATE = 512.0
"""So large that an adapter after a step of SGD is all gradient, and a power of two: exact."""
GRADIENTS_APART = 5e-6
"""Float32 sums in another order, through three blocks: 1.3e-6 is the most that was measured."""


def system_of(family, folder, backend, *, split_layer, labels, **lora):
    patterns = lora_of(family)
    terms = {"r": 4, "target_modules": ALL_LINEAR[family], **lora}
    return SplitSystem(
        tiny_model(family),
        {"nano": split_layer},
        folder,
        training=TrainingTerms(labels=labels, wire_dtype="float32", max_length=16),
        lora=LoraTerms(
            rank_pattern=patterns.rank_pattern, alpha_pattern=patterns.alpha_pattern, **terms
        ),
        optimizer=OptimizerTerms(
            name="sgd", learning_rate=RATE, weight_decay=0.0, schedule="constant", max_grad_norm=0.0
        ),
        backends={"nano": backend},
    )


def gradients_of(system):
    """Return the gradients of the device's adapters after two micro-batches, and their loss."""
    before = system.devices["nano"].adapters()
    batches = [tiny_batch(lengths, seed=n) for n, lengths in enumerate(LENGTHS[:2])]
    loss = sum(system.train("nano", MicroBatch(0, n), batch) for n, batch in enumerate(batches))
    system.close(0, {"nano": 1})
    found = {}
    for name, now in system.devices["nano"].adapters().items():
        pair = before[name]
        found[name] = LoraPair(
            (pair.a_RI.astype(np.float64) - now.a_RI) / RATE,
            (pair.b_OR.astype(np.float64) - now.b_OR) / RATE,
            pair.scaling,
        )
    return loss, found


@pytest.mark.parametrize(("family", "split_layer", "labels"), CASES)
def test_the_gradient_of_every_adapter_is_the_torch_agent_s(family, split_layer, labels, tmp_path):
    choices = {"split_layer": split_layer, "labels": labels}
    loss, gradients = gradients_of(system_of(family, tmp_path, "onnx", **choices))
    expected_loss, expected = gradients_of(system_of(family, tmp_path, "torch", **choices))
    assert largest_difference(gradients, expected) <= GRADIENTS_APART
    assert loss == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_have_the_torch_agent_s_losses(family, labels, tmp_path):
    choices = {"split_layer": 2, "labels": labels, "optimizer": OPTIMIZERS["adamw"]}
    light, heavy = (split_run(family, tmp_path, backend=b, **choices) for b in ("onnx", "torch"))
    assert len(light.losses) == STEPS
    np.testing.assert_allclose(light.losses, heavy.losses, rtol=1e-6)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_dropout_has_the_torch_agent_s_gradients_under_the_same_masks(
    labels, tmp_path, monkeypatch
):
    """Each side draws its own; here torch is given numpy's, as what is drawn is no matter."""
    choices = {"split_layer": 2, "labels": labels, "lora_dropout": 0.5}
    light = system_of("gpt2", tmp_path, "onnx", **choices)
    heavy = system_of("gpt2", tmp_path, "torch", **choices)
    loss, gradients = gradients_of(light)
    on_device = list(light.devices["nano"].adapters())
    drawn = torch_lora.Dropout.__call__
    turn = iter(on_device * 2)

    def numpys(self, x_MI):
        if self is not heavy.devices["nano"]._loaded().adapters.dropout:
            return drawn(self, x_MI)
        mask_MI = DropoutMasks(0.5).mask_MI(self._seed, next(turn), shape=tuple(x_MI.shape))
        return x_MI * torch.from_numpy(mask_MI)

    monkeypatch.setattr(torch_lora.Dropout, "__call__", numpys)
    expected_loss, expected = gradients_of(heavy)
    assert next(turn, None) is None, "every module has had its masks"
    assert largest_difference(gradients, expected) <= GRADIENTS_APART
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    plain, _ = gradients_of(system_of("gpt2", tmp_path, "onnx", split_layer=2, labels=labels))
    assert abs(plain / loss - 1) > 1e-4, "dropping must matter"


# --- classification -------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("split_layer", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_classifier_without_torch_on_the_device_equals_the_monolithic_one(
    family, split_layer, labels, tmp_path
):
    choices = {"split_layer": split_layer, "labels": labels, "optimizer": "adamw"}
    split = classifying.split_run(family, tmp_path, backend="onnx", **choices)
    whole = classifying.whole_run(family, "adamw")
    tolerance = classifying.TOLERANCE["adamw"]
    assert largest_difference(split.adapters, whole.adapters) <= tolerance
    assert split.classifier.keys() == whole.classifier.keys()
    for name, weight in whole.classifier.items():
        assert relative(split.classifier[name], weight) <= tolerance, name
    np.testing.assert_allclose(split.losses, whole.losses, rtol=tolerance)


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("split_layer", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_an_evaluation_has_the_torch_agent_s_loss_and_choices(
    family, split_layer, labels, tmp_path
):
    choices = {"split_layer": split_layer, "labels": labels, "optimizer": "sgd"}
    light, heavy = (
        classifying.system_of(family, tmp_path, backend=backend, **choices)
        for backend in ("onnx", "torch")
    )
    for batch in classifying.batches_of_run(family, 3):
        loss, counts = light.evaluate_with_counts("nano", batch)
        expected_loss, expected_counts = heavy.evaluate_with_counts("nano", batch)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert counts == expected_counts
        assert counts, "there is something to compare"
