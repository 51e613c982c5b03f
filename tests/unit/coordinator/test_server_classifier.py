"""The server's trainer with a classifier: it learns, refuses what cannot be, or has none."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.server_training import MicroBatchInput, MicroBatchKey, ServerTrainer
from shared.errors import NumericsError, ProtocolError
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import pack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.tiny_models import CLASSES, fresh_adapters, tiny_classifier

NANO = DeviceId("nano")
KEY = MicroBatchKey(0, 0)
LENGTHS = (5, 3)
LORA = LoraTerms(r=4, target_modules=("c_attn", "c_fc"))
ADAMW = OptimizerTerms(learning_rate=3e-3, schedule="constant")


def sent(labels):
    hidden = np.random.default_rng(0).standard_normal((sum(LENGTHS), 32)).astype(np.float32)
    return MicroBatchInput(split_layer=1, lengths=LENGTHS, hidden=pack(hidden), labels=labels)


def classifier(labels="server"):
    model = tiny_classifier("gpt2")
    made = ServerTrainer(
        model.config,
        model.tensors,
        first_block=1,
        training=TrainingTerms(
            task="classification",
            classes=CLASSES,
            labels=labels,
            wire_dtype="float32",
            max_length=16,
        ),
        lora=LORA,
        optimizer=ADAMW,
        device="cpu",
    )
    made.set_adapters(fresh_adapters(model.architecture, LORA, blocks=range(1, 3)), fold=False)
    return made, model.classifier


def class_labels(*at):
    labels_N = np.full(sum(LENGTHS), -100, np.int32)
    for place, number in at:
        labels_N[place] = number
    return pack(labels_N)


ENDS = tuple(np.cumsum(LENGTHS) - 1)


def test_a_step_moves_the_classifier_on_the_server():
    made, weights = classifier()
    made.set_classifier(weights)
    made.train(NANO, KEY, sent(class_labels(*((end, 1) for end in ENDS))))
    made.close_step(0, devices=[NANO], target_tokens=len(LENGTHS))
    assert np.abs(made.classifier()["score.weight"] - weights["score.weight"]).max() > 1e-4


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (class_labels(*((end, 3) for end in ENDS)), "class 3 of 3 classes"),
        (class_labels((ENDS[0], 1)), "a sequence without a class"),
        (class_labels(*((end - 1, 1) for end in ENDS)), "a sequence without a class"),
    ],
)
def test_classes_that_cannot_be_are_refused_and_leave_no_trace(labels, says):
    made, weights = classifier()
    made.set_classifier(weights)
    with pytest.raises(NumericsError, match=says):
        made.train(NANO, KEY, sent(labels))
    np.testing.assert_array_equal(made.classifier()["score.weight"], weights["score.weight"])


def test_a_server_without_the_head_has_no_classifier_and_takes_none():
    made, weights = classifier(labels="device")
    assert not made.classifier()
    made.set_classifier({})
    with pytest.raises(ProtocolError, match="the head is on the devices"):
        made.set_classifier(weights)
