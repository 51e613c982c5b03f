"""Importance measured on both sides of any cut is what dense gradients of the whole give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from coordinator.back_pass import GradientResult, MicroBatchInput, MicroBatchKey
from coordinator.importance import Measured
from edge_agent.backends.base import MicroBatch, TokenBatch
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import pack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.closeness import largest_difference
from tests.support.dense_importance import dense_importance
from tests.support.loaded_backends import BACKENDS
from tests.support.split_system import SplitSystem
from tests.support.tiny_models import fresh_adapters, tiny_batch, tiny_model

TARGETS = {"gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "v_proj"), "qwen2": ("down_proj",)}
BATCHES = [tiny_batch((9, 4, 12), seed=0), tiny_batch((7, 7), seed=1), tiny_batch((3,), seed=2)]
OPTIMIZER = OptimizerTerms(learning_rate=3e-3, schedule="constant")


def system(
    folder, family, split_layers: Mapping[str, int], labels="device", backend="torch", **terms
):
    lora = LoraTerms(r=4, target_modules=TARGETS[family], **terms)
    training = TrainingTerms(labels=labels, wire_dtype="float32", max_length=16)
    model = tiny_model(family)
    return SplitSystem(
        model,
        split_layers,
        folder,
        training=training,
        lora=lora,
        optimizer=OPTIMIZER,
        backends=dict.fromkeys(split_layers, backend),
    )


def probe(one: SplitSystem, device: str, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Run the probe of one device, all micro-batches open at once; return its front's sums."""
    backend, split_layer = one.devices[device], one.split_layers[device]
    backend.begin_probe(backend.adapters())
    keys = [MicroBatch(0, index) for index in range(len(batches))]
    if one.alone(device):
        for key, batch in zip(keys, batches, strict=True):
            backend.whole(key, batch, train=True)
        return dict(backend.end_probe())
    assert one.server is not None
    answers = []
    for key, batch in zip(keys, batches, strict=True):
        sent = MicroBatchInput(
            split_layer=split_layer,
            lengths=batch.lengths,
            hidden=backend.forward(key, batch, train=True),
            labels=pack(batch.labels) if one.training.labels == "server" else None,
        )
        name = MicroBatchKey(key.step, key.index)
        answers.append(
            one.server.probe.run(DeviceId(device), name, sent, target_tokens=batch.target_tokens)
        )
    for key, answer in zip(reversed(keys), reversed(answers), strict=True):
        if isinstance(answer, GradientResult):
            backend.backward(key, answer.gradient)
            continue
        _, gradient = backend.head(key, answer.hidden, train=True)
        name = MicroBatchKey(key.step, key.index)
        backend.backward(key, one.server.probe.take_gradient(DeviceId(device), name, gradient))
    return dict(backend.end_probe())


def dense(family: str, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Return what the whole gives, for the targets."""
    model = tiny_model(family)
    lora = LoraTerms(r=4, target_modules=TARGETS[family])
    adapters = fresh_adapters(model.architecture, lora, blocks=range(3))
    return {m: v for m, v in dense_importance(model, adapters, batches).items() if m in adapters}


@pytest.mark.timeout(600)  # a first export takes its time where many tests run at once
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("split_layer", [1, 2, 3])
@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_cut_gives_what_the_whole_gives(backend, family, split_layer, labels, tmp_path):
    one = system(tmp_path, family, {"nano": split_layer}, labels, backend)
    front = probe(one, "nano", BATCHES)
    server = {} if one.server is None else one.server.probe.take()
    assert not front.keys() & server.keys(), "each module is measured on one side"
    tokens = sum(batch.target_tokens for batch in BATCHES)
    assert all(measured.target_tokens == tokens for measured in server.values())
    both = front | {module: measured.magnitude for module, measured in server.items()}
    assert both == pytest.approx(dense(family, BATCHES), rel=1e-5)


def test_devices_with_different_cuts_measure_every_module_on_all_tokens(tmp_path):
    one = system(tmp_path, "gpt2", {"nano": 1, "orin": 2})
    own = {"nano": BATCHES[:1], "orin": BATCHES[1:]}
    fronts = {device: probe(one, device, batches) for device, batches in own.items()}
    total: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for device, sums in fronts.items():
        for module, value in sums.items():
            total[module] += value
            tokens[module] += sum(batch.target_tokens for batch in own[device])
    assert one.server is not None
    for module, measured in one.server.probe.take().items():
        assert isinstance(measured, Measured)
        total[module] += measured.magnitude
        tokens[module] += measured.target_tokens
    assert set(tokens.values()) == {sum(batch.target_tokens for batch in BATCHES)}
    assert dict(total) == pytest.approx(dense("gpt2", BATCHES), rel=1e-5)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_training_goes_on_as_if_there_had_been_no_probe(labels, tmp_path):
    runs = [system(tmp_path, "gpt2", {"nano": 2}, labels, lora_dropout=0.2) for _ in range(2)]
    for step in range(4):
        work = {"nano": [tiny_batch((9, 4), seed=step), tiny_batch((5,), seed=step + 50)]}
        if step != 2:
            assert probe(runs[0], "nano", BATCHES), "something was measured"
        losses = [one.step(step, work) for one in runs]
        assert losses[0] == losses[1]
    assert largest_difference(runs[0].adapters(), runs[1].adapters()) == 0.0
