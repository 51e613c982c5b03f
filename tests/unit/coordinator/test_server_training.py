"""The server's trainer: what it refuses, what it forgets, and what it keeps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from coordinator.server_training import (
    GradientResult,
    HiddenResult,
    LossResult,
    MicroBatchInput,
    MicroBatchKey,
    ServerTrainer,
)
from shared.adapters import LoraPair, ModuleAdapter
from shared.errors import NumericsError, PlanError, ProtocolError, StorageError
from shared.modeling.wire import to_frame
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame, pack, unpack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.tiny_models import VOCAB_SIZE, fresh_adapters, tiny_model

NANO, ORIN = DeviceId("nano"), DeviceId("orin")
KEY = MicroBatchKey(0, 0)
LENGTHS = (5, 3)
HIDDEN = 32
LORA = LoraTerms(r=4, target_modules=("c_attn", "c_fc"))
ADAMW = OptimizerTerms(learning_rate=3e-3, schedule="constant")


def trainer(*, labels="server", first_block=1, lora=LORA, **terms):
    model = tiny_model("gpt2")
    made = ServerTrainer(
        model.config,
        model.tensors,
        first_block=first_block,
        training=TrainingTerms(labels=labels, wire_dtype="float32", max_length=16, **terms),
        lora=lora,
        optimizer=ADAMW,
        device="cpu",
    )
    blocks = range(first_block, 3)
    made.set_adapters(fresh_adapters(model.architecture, lora, blocks=blocks), fold=False)
    return made


def hidden_frame(seed=0, lengths=LENGTHS):
    random = np.random.default_rng(seed)
    return pack(random.standard_normal((sum(lengths), HIDDEN)).astype(np.float32))


def sent(seed=0, *, labels=True, **changes):
    words = np.random.default_rng(seed).integers(0, VOCAB_SIZE, sum(LENGTHS), dtype=np.int32)
    frame = pack(words) if labels else None
    message = MicroBatchInput(
        split_layer=1, lengths=LENGTHS, hidden=hidden_frame(seed), labels=frame
    )
    return dataclasses.replace(message, **changes)


def train(made, device=NANO, *, step=0, seed=0, **changes):
    return made.train(device, MicroBatchKey(step, seed), sent(seed, **changes))


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, pair in actual.items():
        np.testing.assert_array_equal(pair.a_RI, expected[name].a_RI)
        np.testing.assert_array_equal(pair.b_OR, expected[name].b_OR)


def moved(made, before):
    """Tell whether every module's B is another than before."""
    return all(not np.array_equal(made.adapters()[n].b_OR, p.b_OR) for n, p in before.items())


def poisoned(value):
    hidden = unpack(hidden_frame()).copy()
    hidden[3, 4] = value
    return pack(hidden)


def test_a_closed_step_moves_the_adapters_and_reports_the_norm():
    made = trainer()
    before = made.adapters()
    assert isinstance(train(made), GradientResult)
    assert made.close_step(0, devices=[NANO], target_tokens=8) > 0
    assert moved(made, before)


BAD_INPUTS = [
    ({"hidden": poisoned(np.nan)}, NumericsError, "NaN or infinity"),
    ({"hidden": poisoned(np.inf)}, NumericsError, "NaN or infinity"),
    ({"hidden": hidden_frame(lengths=(5, 4))}, NumericsError, r"expected float32\[8, 32\]"),
    ({"hidden": pack(np.zeros((8, 32), np.float16))}, NumericsError, "got float16"),
    ({"lengths": (5, 4)}, NumericsError, "expected"),
    ({"lengths": ()}, NumericsError, "1 to 16 tokens"),
    ({"lengths": (8, 0)}, NumericsError, "1 to 16 tokens"),
    ({"lengths": (17,)}, NumericsError, "1 to 16 tokens"),
    ({"labels": None}, ProtocolError, "labels missing"),
    ({"labels": pack(np.full(8, VOCAB_SIZE, np.int32))}, NumericsError, "token id 101 of 101"),
    ({"labels": pack(np.zeros(7, np.int32))}, NumericsError, r"expected int32\[8\]"),
    ({"labels": pack(np.zeros(8, np.float32))}, NumericsError, "got float32"),
    ({"split_layer": 0}, ProtocolError, "split layer 0"),
    ({"split_layer": 4}, ProtocolError, "split layer 4"),
]


@pytest.mark.parametrize(("changes", "error", "says"), BAD_INPUTS)
def test_a_bad_micro_batch_is_refused_and_leaves_no_trace(changes, error, says):
    made, untouched = trainer(), trainer()
    for one in (made, untouched):
        train(one)
    message = dataclasses.replace(sent(1), **changes)
    with pytest.raises(error, match=says):
        made.train(NANO, MicroBatchKey(0, 1), message)
    with pytest.raises(error, match=says):
        made.evaluate(NANO, message)
    for one in (made, untouched):
        one.close_step(0, devices=[NANO], target_tokens=8)
    same(made.adapters(), untouched.adapters())


def test_labels_that_nobody_asked_for_are_refused():
    with pytest.raises(ProtocolError, match="labels sent, but this run has labels: device"):
        train(trainer(labels="device"))


def head_gradient(seed=1, lengths=LENGTHS):
    return hidden_frame(seed, lengths)


def test_a_micro_batch_stays_open_until_its_head_gradient_comes():
    made = trainer(labels="device")
    result = made.train(NANO, KEY, sent(labels=False))
    assert isinstance(result, HiddenResult)
    assert result.hidden.shape == (8, HIDDEN)
    assert made.open_micro_batches == 1
    answer = made.train_gradient(NANO, KEY, head_gradient())
    assert (answer.dtype, answer.shape) == ("float32", (8, HIDDEN))
    assert made.open_micro_batches == 0


@pytest.mark.parametrize(
    "gradient", [head_gradient(lengths=(5, 4)), poisoned(np.nan), pack(np.zeros((8, 32), "f2"))]
)
def test_a_bad_head_gradient_leaves_the_micro_batch_open(gradient):
    made, untouched = trainer(labels="device"), trainer(labels="device")
    for one in (made, untouched):
        one.train(NANO, KEY, sent(labels=False))
    with pytest.raises(NumericsError, match="head gradient of nano, step 0, micro-batch 0"):
        made.train_gradient(NANO, KEY, gradient)
    for one in (made, untouched):
        one.train_gradient(NANO, KEY, head_gradient())
        one.close_step(0, devices=[NANO], target_tokens=8)
    same(made.adapters(), untouched.adapters())


def test_the_same_micro_batch_cannot_be_open_twice():
    made = trainer(labels="device")
    made.train(NANO, KEY, sent(labels=False))
    made.train(ORIN, KEY, sent(labels=False))
    with pytest.raises(ProtocolError, match="nano, step 0, micro-batch 0 is open already"):
        made.train(NANO, KEY, sent(labels=False))


def test_a_head_gradient_for_nothing_open_is_refused():
    with pytest.raises(ProtocolError, match="is not open"):
        trainer(labels="device").train_gradient(NANO, KEY, head_gradient())


def test_a_step_cannot_close_over_an_open_micro_batch():
    made = trainer(labels="device")
    made.train(NANO, KEY, sent(labels=False))
    with pytest.raises(ProtocolError, match="step 0 cannot close: nano"):
        made.close_step(0, devices=[NANO], target_tokens=8)
    assert made.open_micro_batches == 1


@pytest.mark.parametrize("how", ["dropped", "not named"])
def test_a_lost_devices_share_is_gone_whole(how):
    made, without = trainer(), trainer()
    before = made.adapters()
    train(without, NANO)
    train(made, ORIN, seed=1)
    train(made, NANO)
    train(made, ORIN, seed=2)
    if how == "dropped":
        made.drop(ORIN)
    for one in (made, without):
        one.close_step(0, devices=[NANO], target_tokens=8)
    assert moved(made, before)
    same(made.adapters(), without.adapters())
    for one in (made, without):
        train(one, NANO, step=1)
        one.close_step(1, devices=[NANO, ORIN], target_tokens=8)
    same(made.adapters(), without.adapters())


def test_dropping_a_device_closes_only_its_micro_batches():
    made = trainer(labels="device")
    for device in (NANO, ORIN):
        made.train(device, KEY, sent(labels=False))
    made.drop(ORIN)
    assert made.open_micro_batches == 1
    with pytest.raises(ProtocolError, match="dropped"):
        made.train_gradient(ORIN, KEY, head_gradient())
    made.train_gradient(NANO, KEY, head_gradient())
    assert made.open_micro_batches == 0


def test_blocks_below_a_devices_split_layer_get_no_gradient_of_it():
    made = trainer()
    before = made.adapters()
    train(made, split_layer=2)
    made.close_step(0, devices=[NANO], target_tokens=8)
    changed = {n for n, p in made.adapters().items() if not np.array_equal(p.b_OR, before[n].b_OR)}
    assert changed == {"transformer.h.2.attn.c_attn", "transformer.h.2.mlp.c_fc"}


def test_with_all_blocks_on_the_device_the_server_is_the_head_alone():
    made = trainer(first_block=3)
    result = train(made, split_layer=3)
    assert isinstance(result, GradientResult)
    assert unpack(result.gradient).any()
    assert made.adapters() == {}
    assert made.close_step(0, devices=[NANO], target_tokens=8) == 0.0


def test_evaluation_changes_and_keeps_nothing():
    made = trainer()
    first = made.evaluate(NANO, sent())
    assert isinstance(first, LossResult)
    assert made.evaluate(NANO, sent()).loss_sum == first.loss_sum
    assert made.open_micro_batches == 0
    assert made.close_step(0, devices=[NANO], target_tokens=8) == 0.0


def test_evaluation_and_training_agree_on_the_loss_without_dropout():
    made = trainer()
    assert made.evaluate(NANO, sent()).loss_sum == pytest.approx(train(made).loss_sum, rel=1e-6)


def loss_with_dropout(made, device=NANO, *, micro_batch=0):
    result = made.train(device, MicroBatchKey(0, micro_batch), sent())
    made.drop(device)
    return result.loss_sum


def test_dropout_depends_on_the_key_alone_and_is_off_in_evaluation():
    lora = dataclasses.replace(LORA, lora_dropout=0.5)
    made = trainer(lora=lora)
    first = loss_with_dropout(made)
    assert loss_with_dropout(made, micro_batch=1) != first
    assert loss_with_dropout(made, ORIN) != first
    assert loss_with_dropout(made) == first
    assert loss_with_dropout(trainer(lora=lora)) == first
    assert loss_with_dropout(trainer(lora=lora, seed=1)) != first
    plain = trainer().evaluate(NANO, sent()).loss_sum
    assert made.evaluate(NANO, sent()).loss_sum == plain != first


def two_steps(made, steps):
    for step in steps:
        train(made, step=step, seed=step)
        made.close_step(step, devices=[NANO], target_tokens=8)


def test_a_restored_server_goes_on_as_if_nothing_happened():
    made, resumed = trainer(), trainer()
    two_steps(made, (0, 1))
    kept = {n: ModuleAdapter(pair) for n, pair in made.adapters().items()}
    resumed.set_adapters(kept, fold=False)
    resumed.restore_optimizer(made.optimizer_state())
    before = made.adapters()
    for one in (made, resumed):
        two_steps(one, (2, 3))
    assert moved(made, before)
    same(made.adapters(), resumed.adapters())


def test_a_saved_state_of_another_plan_is_refused():
    with pytest.raises(StorageError, match="of other modules than the adapters"):
        trainer(first_block=2).restore_optimizer(trainer().optimizer_state())


def test_new_adapters_end_the_open_step():
    made = trainer(labels="device")
    made.train(NANO, KEY, sent(labels=False))
    made.set_adapters({}, fold=False)
    assert made.open_micro_batches == 0


def test_a_module_that_is_not_here_is_refused():
    pair = LoraPair(np.zeros((2, 32)), np.zeros((96, 2)), 1.0)
    with pytest.raises(ProtocolError, match=r"transformer\.h\.0\.attn\.c_attn"):
        trainer().set_adapters({"transformer.h.0.attn.c_attn": ModuleAdapter(pair)}, fold=False)


def test_more_tokens_than_positions_is_no_plan():
    model = tiny_model("gpt2")
    with pytest.raises(PlanError, match="65 tokens.*64 positions"):
        ServerTrainer(
            model.config,
            model.tensors,
            first_block=1,
            training=TrainingTerms(max_length=65),
            lora=LORA,
            optimizer=ADAMW,
        )


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_answers_come_in_the_wire_dtype(wire_dtype):
    model = tiny_model("gpt2")
    made = ServerTrainer(
        model.config,
        model.tensors,
        first_block=1,
        training=TrainingTerms(labels="device", wire_dtype=wire_dtype, max_length=16),
        lora=LORA,
        optimizer=ADAMW,
        device="cpu",
    )
    frame = to_frame(torch.randn(8, HIDDEN), dtype=wire_dtype, what="x")
    result = made.train(NANO, KEY, sent(labels=False, hidden=frame))
    assert isinstance(result.hidden, TensorFrame)
    assert result.hidden.dtype == made.train_gradient(NANO, KEY, frame).dtype == wire_dtype
