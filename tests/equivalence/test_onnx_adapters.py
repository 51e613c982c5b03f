"""Whatever a hand-back gives, and whatever a micro-batch looks like: onnx does as torch does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edge_agent.backends import onnx_head
from edge_agent.backends.base import NO_TARGET, MicroBatch, TokenBatch
from shared.adapters import LoraPair, ModuleAdapter
from shared.protocol.tensors import pack, unpack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.closeness import largest, largest_difference, relative
from tests.support.dense_importance import dense_importance
from tests.support.graph_files import ALL_LINEAR
from tests.support.loaded_backends import BACKENDS, loaded
from tests.support.tiny_models import (
    CLASSES,
    classified_batch,
    fresh_adapters,
    tiny_batch,
    tiny_classifier,
    tiny_model,
)

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

KEY = MicroBatch(0, 0)
LENGTHS = (9, 4, 12)
ADAMW = OptimizerTerms(learning_rate=3e-3, schedule="constant", rewarm_steps=2)
SGD = OptimizerTerms(
    name="sgd", learning_rate=64.0, schedule="constant", max_grad_norm=0.0, weight_decay=0.0
)
"""So fast that what is trained is all gradient after a step."""
APART = 5e-6
"""Float32 sums in another order."""


def both(model, folder, *, split_layer=2, optimizer=SGD, rank=4, freeze_a=False):
    """Return a device of each kind, with the same adapters at every linear module."""
    lora = LoraTerms(r=rank, target_modules=ALL_LINEAR[model.config["model_type"]])
    made = {}
    for name in BACKENDS:
        choices = {} if model.training is None else {"task": model.training.task}
        terms = TrainingTerms(
            wire_dtype="float32",
            max_length=16,
            classes=() if model.training is None else CLASSES,
            **choices,
        )
        made[name] = loaded(
            name,
            model,
            folder,
            split_layer=split_layer,
            training=terms,
            lora=LoraTerms(r=rank, target_modules=lora.target_modules, freeze_a=freeze_a),
            optimizer=optimizer,
        )
        held = fresh_adapters(model.architecture, lora, blocks=range(split_layer))
        made[name].set_adapters(held, fold=False)
        if model.classifier:
            made[name].set_classifier(model.classifier)
    return made


def gradient(rows, seed=0):
    return pack(np.random.default_rng(seed).standard_normal((rows, 32)).astype(np.float32))


def pass_through(backend, batch, key=KEY):
    """Run a micro-batch both ways; return the activations."""
    frame = backend.forward(key, batch, train=True)
    backend.backward(key, gradient(frame.shape[0], seed=key.index))
    return unpack(frame)


# --- hand-back ------------------------------------------------------------------------------

RANKS = (4, 0, 1, 6, 3)
RESIDUAL_RANKS = (None, 0, 2, 40, 5)
"""40 is more than any of the weights is held in factors for."""


def handed_back(model, round_):
    """Return what a round begins with: other ranks and residuals, and one module left out.

    The two counts go round at different speeds, so all kinds meet.
    """
    architecture = model.architecture
    modules = [
        f"{architecture.block_path(block)}.{inside}"
        for block in range(2)
        for inside in architecture.linears
    ]
    random = np.random.default_rng(round_)
    adapters = {}
    for place, module in enumerate(modules):
        features_in, features_out = architecture.features(module)
        rank = RANKS[(place + round_) % len(RANKS)]
        residual_rank = RESIDUAL_RANKS[(place + 2 * round_) % len(RESIDUAL_RANKS)]
        adapters[module] = ModuleAdapter(
            _pair(random, (features_in, features_out), rank=rank, scaling=2.0),
            None
            if residual_rank is None
            else _pair(random, (features_in, features_out), rank=residual_rank, scaling=0.5),
        )
    del adapters[modules[round_ % len(modules)]]
    return adapters


def _pair(random, features, *, rank, scaling):
    features_in, features_out = features
    return LoraPair(
        (random.standard_normal((rank, features_in)) / np.sqrt(features_in)).astype(np.float32),
        (0.05 * random.standard_normal((features_out, rank))).astype(np.float32),
        scaling,
    )


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_hand_backs_of_all_ranks_and_residuals_are_taken_as_torch_takes_them(
    fold, freeze_a, tmp_path
):
    """Modules that are not named keep their pairs and moments; those without a rank, nothing."""
    model = tiny_model("gpt2")
    devices = both(model, tmp_path, optimizer=ADAMW, freeze_a=freeze_a)
    steps = itertools.count()
    for round_ in range(6):
        if round_:
            for device in devices.values():
                device.set_adapters(handed_back(model, round_), fold=fold)
        for step in itertools.islice(steps, 2):
            batch = tiny_batch(LENGTHS, seed=step)
            ran = {n: pass_through(d, batch, MicroBatch(step, 0)) for n, d in devices.items()}
            assert relative(ran["onnx"], ran["torch"]) <= APART, round_
            norms = [d.step(step, target_tokens=25) for d in devices.values()]
            assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        light, heavy = (devices[name].adapters() for name in ("onnx", "torch"))
        assert largest_difference(light, heavy) <= 1e-4, round_


def test_all_kinds_of_hand_back_were_there():
    model = tiny_model("gpt2")
    kinds = {
        (one.trainable.rank, None if one.frozen is None else one.frozen.rank)
        for round_ in range(1, 6)
        for one in handed_back(model, round_).values()
    }
    assert {rank for rank, _ in kinds} == set(RANKS)
    assert {residual for _, residual in kinds} == set(RESIDUAL_RANKS)
    assert {(0, 40), (0, 2)} & kinds, "a residual alone"


# --- importance -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_importance_counts_the_residual_and_the_pair(family, tmp_path):
    model = tiny_model(family)
    adapters = {}
    for block in range(3):
        for place, inside in enumerate(model.architecture.linears):
            module = f"{model.architecture.block_path(block)}.{inside}"
            random, features = np.random.default_rng(place), model.architecture.features(module)
            residual = _pair(random, features, rank=(2, 40)[place % 2], scaling=0.5)
            trained = _pair(random, features, rank=(0, 3)[block % 2], scaling=2.0)
            adapters[module] = ModuleAdapter(trained, residual)
    device = both(model, tmp_path, split_layer=3)["onnx"]
    device.set_adapters(adapters, fold=False)
    batches = [tiny_batch(LENGTHS), tiny_batch((5,), seed=1)]
    device.begin_probe(adapters)
    for index, batch in enumerate(batches):
        device.whole(MicroBatch(0, index), batch, train=True)
    assert device.end_probe() == pytest.approx(dense_importance(model, adapters, batches), rel=1e-5)


# --- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("lengths", [(1,), (16,), (1, 1), (1, 13, 6), (7, 7, 7)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_shape_has_torch_s_activations_and_gradients(family, lengths, rank, tmp_path):
    devices = both(tiny_model(family), tmp_path, rank=rank)
    batch = tiny_batch(lengths, prompt=0)
    ran = {name: pass_through(device, batch) for name, device in devices.items()}
    assert ran["onnx"].shape == (sum(lengths), 32)
    assert relative(ran["onnx"], ran["torch"]) <= APART
    for device in devices.values():
        device.step(0, target_tokens=1)
    light, heavy = (devices[name].adapters() for name in ("onnx", "torch"))
    # At rank 1 a token's gradient of B is one dot product, a x, times a vector, and of all digits
    # of a product that nearly cancels out few are left: 2e-5 is the most that was measured.
    assert largest_difference(light, heavy) <= (1e-4 if rank == 1 else APART)


def judged(device, batch, hidden):
    """Return loss, gradient of the hidden states, and gradient norm after the whole way."""
    device.forward(KEY, batch, train=True)
    loss, frame = device.head(KEY, hidden, train=True)
    device.backward(KEY, gradient(len(batch.input_ids)))
    return loss, unpack(frame)


@pytest.mark.parametrize("task", ["words", "classes"])
def test_a_head_in_chunks_is_the_whole_head(task, tmp_path, monkeypatch):
    if task == "words":
        model, batch = tiny_model("gpt2"), tiny_batch((16, 9, 16))
    else:
        model = tiny_classifier("bert")
        batch = classified_batch((2,) * 40, model.architecture)
    rows = 41 if task == "words" else 40
    hidden = gradient(rows, seed=5)
    devices = both(model, tmp_path)
    expected = judged(devices["torch"], batch, hidden)
    whole = judged(devices["onnx"], batch, hidden)
    devices["onnx"].discard()
    sizes = count_chunks(monkeypatch)
    assert devices["onnx"].whole(KEY, batch, train=False) > 0
    counts = devices["onnx"].take_counts()
    assert len(sizes) == 1
    monkeypatch.setattr(onnx_head, "CHUNK_LOGITS", 1)
    sizes.clear()
    chunked = judged(devices["onnx"], batch, hidden)
    assert sizes == [16, 16, 3 if task == "words" else 8], "16 rows at least"
    for loss, found in (whole, chunked):
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert relative(found, expected[1]) <= APART
    devices["torch"].step(0, target_tokens=3)
    devices["onnx"].step(0, target_tokens=3)
    for name, weight in devices["torch"].classifier().items():
        assert relative(devices["onnx"].classifier()[name], weight) <= APART
    assert devices["onnx"].whole(KEY, batch, train=False) == pytest.approx(
        devices["torch"].whole(KEY, batch, train=False), rel=1e-6
    )
    for one in (devices["onnx"].take_counts(), counts):
        assert len(one) == (0 if task == "words" else len(CLASSES))


def count_chunks(monkeypatch):
    """Return a list that grows by the rows of every chunk."""
    sizes, run = [], onnx_head.OnnxHead._run

    def counting(self, hidden_CD, targets_C, *, train):
        sizes.append(len(targets_C))
        return run(self, hidden_CD, targets_C, train=train)

    monkeypatch.setattr(onnx_head.OnnxHead, "_run", counting)
    return sizes


@pytest.mark.parametrize("where", ["apart", "whole"])
def test_a_micro_batch_without_any_target_teaches_nothing(where, tmp_path):
    devices = both(tiny_model("gpt2"), tmp_path, split_layer=3)
    some = tiny_batch(LENGTHS)
    none = TokenBatch(some.input_ids, np.full_like(some.labels, NO_TARGET), some.lengths)
    assert none.target_tokens == 0
    for device in devices.values():
        if where == "whole":
            assert device.whole(KEY, none, train=True) == 0.0
            assert device.whole(KEY, none, train=False) == 0.0
        else:
            hidden = device.forward(KEY, none, train=True)
            loss, frame = device.head(KEY, hidden, train=True)
            assert loss == 0.0
            assert not unpack(frame).any()
            device.backward(KEY, frame)
        assert device.step(0, target_tokens=1) == 0.0
        assert device.whole(KEY, some, train=True) > 0
    norms = [device.step(1, target_tokens=25) for device in devices.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_what_is_in_flight_comes_back_in_any_order(tmp_path):
    devices = both(tiny_model("gpt2"), tmp_path)
    batches = [tiny_batch(lengths, seed=n) for n, lengths in enumerate([(9, 4), (16,), (1, 2, 3)])]
    for order, device in zip([(2, 0, 1), (0, 1, 2)], devices.values(), strict=True):
        for index, batch in enumerate(batches):
            device.forward(MicroBatch(0, index), batch, train=True)
        for index in order:
            rows = len(batches[index].input_ids)
            device.backward(MicroBatch(0, index), gradient(rows, seed=index))
        device.step(0, target_tokens=9)
    light, heavy = (device.adapters() for device in devices.values())
    assert largest(relative(light[name].b_OR, pair.b_OR) for name, pair in heavy.items()) <= APART
