"""The server's half of importance: what counts, what is forgotten, what is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.back_pass import GradientResult, HiddenResult, MicroBatchInput, MicroBatchKey
from coordinator.server_training import ServerTrainer
from shared.errors import NumericsError, ProtocolError
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import pack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.tiny_models import VOCAB_SIZE, fresh_adapters, tiny_model

NANO, ORIN = DeviceId("nano"), DeviceId("orin")
KEY = MicroBatchKey(0, 0)
LENGTHS, TOKENS = (5, 3), 8
LORA = LoraTerms(r=4, target_modules=("c_attn", "c_fc"), rank_pattern={"h.1.attn.c_attn": 0})
BLOCK_1 = {"transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"}
BLOCK_2 = {"transformer.h.2.attn.c_attn", "transformer.h.2.mlp.c_fc"}


def trainer(labels="device", **lora):
    model = tiny_model("gpt2")
    made = ServerTrainer(
        model.config,
        model.tensors,
        first_block=1,
        training=TrainingTerms(labels=labels, wire_dtype="float32", max_length=16),
        lora=LoraTerms(**{"r": 4, "target_modules": LORA.target_modules, **lora}),
        optimizer=OptimizerTerms(learning_rate=3e-3, schedule="constant"),
        device="cpu",
    )
    made.set_adapters(fresh_adapters(model.architecture, LORA, blocks=range(1, 3)), fold=False)
    return made


def frame(seed=0):
    random = np.random.default_rng(seed)
    return pack(random.standard_normal((TOKENS, 32)).astype(np.float32))


def sent(labels=False, *, split_layer=1, hidden=None):
    words = np.random.default_rng(0).integers(0, VOCAB_SIZE, TOKENS, dtype=np.int32)
    return MicroBatchInput(
        split_layer=split_layer,
        lengths=LENGTHS,
        hidden=frame() if hidden is None else hidden,
        labels=pack(words) if labels else None,
    )


def run(made, device=NANO, key=KEY, **changes):
    return made.probe.run(device, key, sent(**changes), target_tokens=TOKENS)


def measure(made, **changes):
    assert isinstance(run(made, **changes), HiddenResult)
    made.probe.take_gradient(NANO, KEY, frame(1))
    return made.probe.take()


def test_every_target_is_measured_also_one_without_a_rank():
    measured = measure(trainer())
    assert measured.keys() == BLOCK_1 | BLOCK_2
    assert all(one.magnitude > 0 and one.target_tokens == TOKENS for one in measured.values())


def test_blocks_that_a_device_holds_are_measured_there():
    assert measure(trainer(), split_layer=2).keys() == BLOCK_2
    assert measure(trainer(), split_layer=3) == {}


def test_each_module_counts_the_tokens_that_passed_through_it():
    made = trainer()
    for device, split_layer in ((NANO, 1), (ORIN, 2)):
        run(made, device, split_layer=split_layer)
        made.probe.take_gradient(device, KEY, frame(1))
    tokens = {module: one.target_tokens for module, one in made.probe.take().items()}
    assert tokens == dict.fromkeys(BLOCK_1, TOKENS) | dict.fromkeys(BLOCK_2, 2 * TOKENS)


def test_what_was_taken_is_not_there_again():
    made = trainer()
    assert measure(made)
    assert made.probe.take() == {}


def test_a_probe_has_no_dropout_also_between_training_micro_batches():
    made = trainer(lora_dropout=0.5)
    made.train(NANO, KEY, sent())
    assert measure(made) == measure(trainer())


def test_micro_batches_that_are_open_together_add_up():
    made, apart = trainer(), trainer()
    keys = [MicroBatchKey(0, index) for index in range(2)]
    for key in keys:
        run(made, key=key, hidden=frame(key.micro_batch))
    for key in reversed(keys):
        made.probe.take_gradient(NANO, key, frame(1))
    each = [measure(apart, hidden=frame(index)) for index in range(2)]
    for module, one in made.probe.take().items():
        assert one.target_tokens == 2 * TOKENS
        expected = sum(part[module].magnitude for part in each)
        assert one.magnitude == pytest.approx(expected, rel=1e-12)


def test_with_the_head_here_it_is_measured_at_once():
    made = trainer("server")
    assert isinstance(run(made, labels=True), GradientResult)
    assert made.open_micro_batches == 0
    assert made.probe.take().keys() == BLOCK_1 | BLOCK_2


def test_a_bad_gradient_leaves_the_micro_batch_open_and_nothing_measured():
    made = trainer()
    run(made)
    bad = np.full((TOKENS, 32), np.nan, np.float32)
    with pytest.raises(NumericsError, match="head gradient of nano, probe of step 0"):
        made.probe.take_gradient(NANO, KEY, pack(bad))
    assert made.open_micro_batches == 1
    made.probe.take_gradient(NANO, KEY, frame(1))
    assert made.probe.take() == measure(trainer())


def test_what_overflows_is_refused_and_not_measured():
    made = trainer()
    run(made)
    huge = np.full((TOKENS, 32), 3e38, np.float32)
    with pytest.raises(NumericsError, match="importance of transformer"):
        made.probe.take_gradient(NANO, KEY, pack(huge))
    assert made.probe.take() == {}


def test_a_micro_batch_is_open_once_and_its_gradient_taken_once():
    made = trainer()
    run(made)
    with pytest.raises(ProtocolError, match="is open already"):
        run(made)
    made.train(NANO, KEY, sent())  # the same key of another purpose
    made.probe.take_gradient(NANO, KEY, frame(1))
    with pytest.raises(ProtocolError, match="is not open"):
        made.probe.take_gradient(NANO, KEY, frame(1))
    made.train_gradient(NANO, KEY, frame(1))


def test_a_lost_devices_open_micro_batches_are_forgotten():
    made = trainer()
    for device in (NANO, ORIN):
        run(made, device)
    made.drop(ORIN)
    assert made.open_micro_batches == 1
    with pytest.raises(ProtocolError, match="dropped"):
        made.probe.take_gradient(ORIN, KEY, frame(1))
    made.probe.take_gradient(NANO, KEY, frame(1))


def test_an_optimizer_step_drops_what_went_through_the_old_adapters():
    made = trainer()
    made.train(NANO, KEY, sent())
    run(made, ORIN)
    made.train_gradient(NANO, KEY, frame(1))
    made.close_step(0, devices=[NANO], target_tokens=TOKENS)
    with pytest.raises(ProtocolError, match="is not open"):
        made.probe.take_gradient(ORIN, KEY, frame(1))


def test_new_adapters_end_the_probe():
    made = trainer()
    run(made, ORIN)
    run(made)
    made.probe.take_gradient(NANO, KEY, frame(1))
    made.set_adapters({}, fold=False)
    assert made.open_micro_batches == 0
    assert made.probe.take() == {}
