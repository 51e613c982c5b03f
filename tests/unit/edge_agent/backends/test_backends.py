"""What is true of every backend, on its own and against the server's trainer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_agent.backends import open_backend
from edge_agent.backends.base import MicroBatch, TokenBatch
from shared.adapters import LoraPair, ModuleAdapter
from shared.errors import ConfigError, ModelError, NumericsError, PlanError, ProtocolError
from shared.protocol.tensors import pack, unpack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.closeness import largest_difference
from tests.support.loaded_backends import BACKENDS, NANO, front_base, loaded
from tests.support.split_system import SplitSystem
from tests.support.tiny_models import VOCAB_SIZE, fresh_adapters, tiny_batch, tiny_model

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

KEY = MicroBatch(0, 0)
LENGTHS = (9, 4, 12)
LORA = LoraTerms(r=4, target_modules=("c_attn", "c_fc"))
OPTIMIZER = OptimizerTerms(learning_rate=3e-3, schedule="constant")
MODULE = "transformer.h.0.attn.c_attn"


@pytest.fixture(params=BACKENDS)
def name(request):
    return request.param


@pytest.fixture
def backend(name, tmp_path):
    """A function that returns a backend with a part of a GPT-2 and adapters in it."""

    def made(*, split_layer=2, labels="device", lora=LORA, **terms):
        model = tiny_model("gpt2")
        one = loaded(
            name,
            model,
            tmp_path,
            split_layer=split_layer,
            training=TrainingTerms(
                labels=labels, **{"wire_dtype": "float32", "max_length": 16, **terms}
            ),
            lora=lora,
            optimizer=OPTIMIZER,
        )
        held = fresh_adapters(model.architecture, lora, blocks=range(split_layer))
        one.set_adapters(held, fold=False)
        return one

    return made


@pytest.fixture
def system(name, tmp_path):
    """A function that returns a device with such a backend, and the server."""

    def made(*, labels="device", lora=LORA, **terms):
        terms = {"wire_dtype": "float32", "max_length": 16, **terms}
        return SplitSystem(
            tiny_model("gpt2"),
            {"nano": 2},
            tmp_path,
            training=TrainingTerms(labels=labels, **terms),
            lora=lora,
            optimizer=OPTIMIZER,
            backends={"nano": name},
        )

    return made


@pytest.fixture
def base(name, tmp_path):
    return front_base(name, tiny_model("gpt2"), tmp_path, split_layer=2, lora=LORA)


def gradient(seed=0, lengths=LENGTHS):
    random = np.random.default_rng(seed)
    return pack(random.standard_normal((sum(lengths), 32)).astype(np.float32))


def run_step(made, step=0):
    made.forward(MicroBatch(step, 0), tiny_batch(LENGTHS), train=True)
    made.backward(MicroBatch(step, 0), gradient())
    return made.step(step, target_tokens=25)


def same(actual, expected):
    assert largest_difference(actual, expected) == 0.0


def test_a_backend_is_opened_by_name(name):
    assert open_backend(name, device="cpu").name == name
    with pytest.raises(ConfigError, match="'tensorflow' does not exist.*torch"):
        open_backend("tensorflow")


def test_a_step_moves_every_adapter(backend):
    made = backend()
    before = made.adapters()
    assert run_step(made) > 0
    assert all(not np.array_equal(made.adapters()[n].b_OR, p.b_OR) for n, p in before.items())


def test_nothing_works_before_a_model_is_loaded(name):
    with pytest.raises(ProtocolError, match="no part of the model is loaded"):
        open_backend(name, device="cpu").forward(KEY, tiny_batch(LENGTHS), train=True)


def test_loading_again_starts_from_the_pristine_base(backend):
    made = backend()
    expected = unpack(made.forward(KEY, tiny_batch(LENGTHS), train=False))
    pair = LoraPair(np.ones((2, 32)), np.ones((96, 2)), 1.0)
    made.set_adapters({MODULE: ModuleAdapter(pair, pair)}, fold=True)
    assert not np.allclose(unpack(made.forward(KEY, tiny_batch(LENGTHS), train=False)), expected)
    again = backend()
    np.testing.assert_array_equal(
        unpack(again.forward(KEY, tiny_batch(LENGTHS), train=False)), expected
    )


def test_a_missing_piece_is_refused(name, base):
    files = {name: path for name, path in base.files.items() if name != "block.1"}
    with pytest.raises(ModelError, match=r"transformer\.h\.1.*missing"):
        open_backend(name, device="cpu").load(
            dataclasses.replace(base, files=files),
            device_id=NANO,
            training=TrainingTerms(max_length=16),
            lora=LORA,
            optimizer=OPTIMIZER,
        )


@pytest.mark.parametrize("config_json", ["{", "[]", '{"model_type": "bloom"}'])
def test_a_config_that_makes_no_sense_is_refused(config_json, name, base):
    with pytest.raises(ModelError):
        open_backend(name, device="cpu").load(
            dataclasses.replace(base, config_json=config_json),
            device_id=NANO,
            training=TrainingTerms(max_length=16),
            lora=LORA,
            optimizer=OPTIMIZER,
        )


def test_more_tokens_than_positions_is_no_plan(backend):
    with pytest.raises(PlanError, match="65 tokens.*64 positions"):
        backend(max_length=65)


@pytest.mark.parametrize("word", [VOCAB_SIZE, -1])
def test_a_token_the_model_does_not_have_is_refused(word, backend):
    batch = tiny_batch((4,))
    batch.input_ids[2] = word
    with pytest.raises(ModelError, match="101 words: tokenizer"):
        backend().forward(KEY, batch, train=True)


def test_a_sequence_above_the_runs_length_is_refused(backend):
    with pytest.raises(ModelError, match="17 tokens; max_length is 16"):
        backend().forward(KEY, tiny_batch((17,)), train=True)


def test_lengths_that_do_not_add_up_are_refused(backend):
    batch = tiny_batch((4, 3))
    with pytest.raises(ProtocolError, match="add up to 6"):
        backend().forward(KEY, TokenBatch(batch.input_ids, batch.labels, (3, 3)), train=True)


def poisoned():
    values = unpack(gradient()).copy()
    values[0, 0] = np.nan
    return pack(values)


@pytest.mark.parametrize(
    "bad", [gradient(lengths=(9, 4)), poisoned(), pack(np.zeros((25, 32), "f2"))]
)
def test_a_bad_gradient_is_refused_and_leaves_no_trace(bad, backend):
    made, untouched = backend(), backend()
    for one in (made, untouched):
        one.forward(KEY, tiny_batch(LENGTHS), train=True)
    with pytest.raises(NumericsError):
        made.backward(KEY, bad)
    with pytest.raises(NumericsError):
        made.head(KEY, bad, train=True)
    for one in (made, untouched):
        one.backward(KEY, gradient())
        one.step(0, target_tokens=25)
    same(made.adapters(), untouched.adapters())


def test_a_gradient_is_taken_once(backend):
    made = backend()
    run_step(made)
    with pytest.raises(ProtocolError, match="micro-batch 0 of step 0 is not open"):
        made.backward(KEY, gradient())


def test_what_was_discarded_leaves_no_trace(backend):
    made, untouched = backend(), backend()
    made.forward(KEY, tiny_batch(LENGTHS, seed=3), train=True)
    made.backward(KEY, gradient(1))
    made.forward(MicroBatch(0, 1), tiny_batch(LENGTHS, seed=4), train=True)
    made.discard()
    with pytest.raises(ProtocolError):
        made.backward(MicroBatch(0, 1), gradient())
    for one in (made, untouched):
        run_step(one)
    same(made.adapters(), untouched.adapters())


def test_micro_batches_may_be_in_flight_together(backend):
    made, in_turn = backend(), backend()
    keys = [MicroBatch(0, index) for index in range(3)]
    for key in keys:
        made.forward(key, tiny_batch(LENGTHS, seed=key.index), train=True)
    for key in keys:
        made.backward(key, gradient(key.index))
        in_turn.forward(key, tiny_batch(LENGTHS, seed=key.index), train=True)
        in_turn.backward(key, gradient(key.index))
    for one in (made, in_turn):
        one.step(0, target_tokens=25)
    same(made.adapters(), in_turn.adapters())


def test_evaluation_between_steps_changes_nothing(backend):
    made, untouched = backend(), backend()
    made.forward(KEY, tiny_batch(LENGTHS), train=True)
    hidden = made.forward(KEY, tiny_batch(LENGTHS, seed=9), train=False)
    loss, nothing = made.head(KEY, hidden, train=False)
    assert loss > 0
    assert nothing is None
    made.backward(KEY, gradient())
    made.step(0, target_tokens=25)
    run_step(untouched)
    same(made.adapters(), untouched.adapters())


@pytest.mark.parametrize("labels", ["device", "server"])
def test_evaluation_is_the_training_loss_before_the_step(labels, system):
    one = system(labels=labels)
    batch = tiny_batch(LENGTHS)
    evaluated = one.evaluate("nano", batch)
    assert one.train("nano", KEY, batch) == pytest.approx(evaluated, rel=1e-6)


def test_dropout_is_seeded_by_the_micro_batch(backend):
    lora = dataclasses.replace(LORA, lora_dropout=0.5)
    made = backend(lora=lora)

    def activations(key, *, train=True):
        frame = made.forward(key, tiny_batch(LENGTHS), train=train)
        made.discard()
        return bytes(frame.data)

    first = activations(KEY)
    assert activations(MicroBatch(0, 1)) != first
    assert activations(MicroBatch(1, 0)) != first
    assert activations(KEY) == first
    plain = bytes(backend().forward(KEY, tiny_batch(LENGTHS), train=True).data)
    assert activations(KEY, train=False) == plain != first


def test_a_repeated_run_with_dropout_is_identical(system):
    lora = dataclasses.replace(LORA, lora_dropout=0.2)
    runs = [system(lora=lora) for _ in range(2)]
    losses = [
        [one.step(step, {"nano": [tiny_batch(LENGTHS, seed=step)]}) for step in range(3)]
        for one in runs
    ]
    assert losses[0] == losses[1]
    same(runs[0].adapters(), runs[1].adapters())


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize(
    ("terms", "tolerance"),
    [
        ({"wire_dtype": "bfloat16"}, 0.1),
        ({"wire_dtype": "float16"}, 0.02),
        ({"wire_dtype": "bfloat16", "dtype": "bfloat16"}, 0.15),
    ],
)
def test_half_precision_runs_close_to_float32(terms, tolerance, labels, system):
    exact, half = system(labels=labels), system(labels=labels, **terms)
    start = exact.adapters()
    for step in range(5):
        work = {"nano": [tiny_batch(LENGTHS, seed=step)]}
        assert half.step(step, work) == pytest.approx(exact.step(step, work), rel=0.02)
    # Compared with how far the run went, not with where it stands.
    for name, pair in exact.adapters().items():
        went = np.linalg.norm(pair.b_OR - start[name].b_OR)
        apart = np.linalg.norm(half.adapters()[name].b_OR - pair.b_OR)
        assert apart <= tolerance * went
        assert half.adapters()[name].b_OR.dtype == np.float32


def probe(made, *, seed=0):
    made.begin_probe([MODULE])
    made.forward(KEY, tiny_batch(LENGTHS, seed=seed), train=True)
    made.backward(KEY, gradient(seed))
    return made.end_probe()


def test_a_probe_between_steps_changes_nothing(backend):
    lora = dataclasses.replace(LORA, lora_dropout=0.5)
    made, untouched = backend(lora=lora), backend(lora=lora)
    for step in range(3):
        assert probe(made, seed=step)[MODULE] > 0
        for one in (made, untouched):
            run_step(one, step)
    same(made.adapters(), untouched.adapters())


def test_gradients_gathered_before_a_probe_are_there_after_it(backend):
    made, untouched = backend(), backend()
    for one in (made, untouched):
        one.forward(KEY, tiny_batch(LENGTHS), train=True)
        one.backward(KEY, gradient())
    probe(made)
    for one in (made, untouched):
        one.step(0, target_tokens=25)
    same(made.adapters(), untouched.adapters())


def test_a_probe_knows_no_dropout_and_adds_up(backend):
    plain = backend()
    dropping = backend(lora=dataclasses.replace(LORA, lora_dropout=0.5))
    assert probe(dropping) == probe(plain)
    plain.begin_probe([MODULE])
    for index, seed in enumerate((0, 1)):
        key = MicroBatch(0, index)
        plain.forward(key, tiny_batch(LENGTHS, seed=seed), train=True)
        plain.backward(key, gradient(seed))
    each = [probe(backend(), seed=seed)[MODULE] for seed in (0, 1)]
    assert plain.end_probe()[MODULE] == pytest.approx(sum(each), rel=1e-12)


def test_an_evaluation_in_a_probe_is_not_measured(backend):
    made = backend()
    expected = probe(made)
    made.begin_probe([MODULE])
    made.forward(KEY, tiny_batch(LENGTHS), train=True)
    hidden = made.forward(KEY, tiny_batch(LENGTHS, seed=9), train=False)
    made.head(KEY, hidden, train=False)
    made.backward(KEY, gradient())
    assert made.end_probe() == expected


def test_a_probe_begins_and_ends_once_and_between_micro_batches(backend):
    made = backend()
    with pytest.raises(ProtocolError, match="no probe can end"):
        made.end_probe()
    with pytest.raises(ProtocolError, match="ln_1 is no linear module held here"):
        made.begin_probe(["transformer.h.0.ln_1"])
    made.forward(KEY, tiny_batch(LENGTHS), train=True)
    with pytest.raises(ProtocolError, match="a probe cannot begin"):
        made.begin_probe([MODULE])
    made.backward(KEY, gradient())
    made.begin_probe([MODULE])
    with pytest.raises(ProtocolError, match="a probe cannot begin"):
        made.begin_probe([MODULE])
    made.forward(KEY, tiny_batch(LENGTHS), train=True)
    with pytest.raises(ProtocolError, match="no probe can end"):
        made.end_probe()


def test_a_probe_that_is_given_up_leaves_no_trace(backend):
    made, untouched = backend(), backend()
    made.begin_probe([MODULE])
    made.forward(KEY, tiny_batch(LENGTHS), train=True)
    made.discard()
    for one in (made, untouched):
        run_step(one)
    same(made.adapters(), untouched.adapters())


def test_importance_that_is_not_finite_is_refused(backend):
    made = backend(wire_dtype="float32")
    made.begin_probe([MODULE])
    made.forward(KEY, tiny_batch(LENGTHS), train=True)
    with pytest.raises(NumericsError, match="importance of transformer"):
        made.backward(KEY, pack(np.full((25, 32), 1e38, np.float32)))
    assert made.end_probe() == {}
