"""Laws 1, 4, 5 and 6 of a classifier in the whole system: every message, round and hand-back."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from coordinator import checkpoints
from coordinator.classifier import TrainedClassifier
from coordinator.export import export_adapter, export_merged
from coordinator.model_card import ModelCard
from coordinator.strategies import STRATEGIES
from edge_agent.backends.base import NO_TARGET
from shared.errors import ConfigError
from shared.protocol.messages import EvaluationResult, PieceBytes, RoundResult, RoundStart
from tests.equivalence.test_system_is_whole import batches_of, first_adapters
from tests.equivalence.test_text_stays_home import leaks, secrets, tensors_of
from tests.support.closeness import relative
from tests.support.faults import RandomFaults
from tests.support.monolithic import logits_of, train_whole
from tests.support.outcomes import LINES, TOLERANCE
from tests.support.simulation import CLASSIFICATION, Simulation
from tests.support.spies import watch_hand_backs
from tests.support.tiny_models import CLASSES, CLASSIFYING, PADDING, tiny_model
from tests.support.traffic import messages
from tests.support.vocabularies import byte_level

ROUNDS, STEPS, BLOCKS = 2, 10, 3
BERT = ["query", "value", "attention.output.dense", "intermediate.dense"]
TARGETS = {"gpt2": ["c_attn", "c_fc"], "bert": BERT, "roberta": BERT}
GATED = ["q_proj", "v_proj", "down_proj"]
LEARNING_RATE = {"sgd": 0.03, "adamw": 3e-3}


def system(folder, family, *, devices, optimizer="adamw", labels="device", **changes):
    faults = changes.pop("faults", None)
    rounds, steps = changes.pop("rounds", ROUNDS), changes.pop("steps", STEPS)
    return Simulation(
        folder,
        family,
        settings={
            "rounds": {"count": rounds, "steps": steps},
            "plan": {"batch": 3, "micro_batch": 2, "devices": devices},
            "devices": {"min": len(devices)},
            "lora": {"r": 4, "lora_alpha": 8.0, "target_modules": TARGETS.get(family, GATED)},
            "optimizer": {
                "name": optimizer,
                "learning_rate": LEARNING_RATE[optimizer],
                "max_grad_norm": 0.0,
            },
            "training": {
                "task": "classification",
                "classes": CLASSES,
                "max_length": 48,
                "labels": labels,
                "wire_dtype": "float32",
            },
            **changes,
        },
        faults=faults,
        model_changes={"pad_token_id": PADDING, "training": CLASSIFICATION},
    )


def whole_model(family):
    words = byte_level().get_vocab_size()
    changes = {"vocab_size": words, "pad_token_id": PADDING}
    return tiny_model(family, training=CLASSIFICATION, **changes)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A place for a run, and a way to watch it."""
    return tmp_path, monkeypatch


@pytest.mark.parametrize(
    ("split_layer", "labels", "optimizer"),
    [
        (1, "device", "adamw"),
        (BLOCKS, "device", "sgd"),
        (2, "server", "adamw"),
        (BLOCKS, "server", "sgd"),
    ],
)
@pytest.mark.parametrize("family", CLASSIFYING)
def test_one_device_through_the_whole_protocol_equals_a_peft_run(
    family, split_layer, labels, optimizer, begun
):
    tmp_path, monkeypatch = begun
    plans = {"a": {"split_layer": split_layer}}
    sim = system(tmp_path, family, devices=plans, optimizer=optimizer, labels=labels)
    seen = watch_hand_backs(monkeypatch, sim)
    new = dict(sim.model.classifier.weights)
    sim.add_device("a", lines=LINES)
    sim.run()
    start = {m: pair for held in first_adapters(seen).values() for m, pair in held.items()}
    whole = train_whole(
        whole_model(family),
        batches_of(sim, "a", ROUNDS * STEPS),
        lora=sim.config.lora,
        optimizer=sim.config.optimizer,
        start=start,
        classifier=new,
    )
    for module, pair in whole.adapters.items():
        apart = relative(sim.model.update[module].total.delta_OI(), pair.delta_OI())
        assert apart <= TOLERANCE[optimizer], module
    for name, weight in whole.classifier.items():
        assert relative(sim.model.classifier.weights[name], weight) <= TOLERANCE[optimizer], name
        assert np.abs(weight - new[name]).max() > 1e-3, "nothing was learnt"


def three_devices(folder, family, **changes):
    plans = {"a": {"split_layer": 1, "r": 2}, "b": {"split_layer": 2, "r": 6}, "c": {}}
    sim = system(folder, family, devices=plans, **changes)
    for device in plans:
        sim.add_device(device, lines=LINES)
    return sim


@pytest.mark.parametrize("labels", ["device", "server"])
@pytest.mark.parametrize("family", CLASSIFYING)
def test_the_exported_classifier_is_the_run(family, labels, tmp_path):
    sim = three_devices(tmp_path, family, labels=labels, steps=3)
    sim.run()
    adapter = exported(sim, tmp_path / "adapter")
    words = (adapter / "README.md").read_text()
    assert "accuracy on held-out texts: 25.0% before, 75.0% after" in words
    assert "F1 on held-out texts: not measured before, 70.0% after" in words
    assert "num_labels=3" in words
    assert "pipeline_tag: text-classification" in words
    model = opened(sim, adapter)
    batches = [b for d in sim.devices for b in held_out(sim, d)]
    nats, chosen, actual = 0.0, [], []
    for batch in batches:
        logits = quiet_logits(model, batch)
        classes = torch.from_numpy(batch.labels[batch.labels != NO_TARGET].astype(np.int64))
        nats += float(torch.nn.functional.cross_entropy(logits, classes, reduction="sum"))
        chosen += logits.argmax(dim=1).tolist()
        actual += classes.tolist()
    last = [line for line in sim.metrics() if "eval/loss" in line][-1]
    assert nats / len(actual) == pytest.approx(last["eval/loss"], rel=1e-4)
    right = sum(a == c for a, c in zip(actual, chosen, strict=True))
    assert last["eval/accuracy"] == pytest.approx(right / len(actual))
    assert last["eval/f1"] == pytest.approx(macro_f1(actual, chosen))
    assert "eval/perplexity" not in last
    merged = export_merged(
        adapter, sim.config.model.name, tmp_path / "merged", classes=sim.config.training.classes
    )
    plain = from_pretrained(str(merged))
    assert plain.config.id2label == dict(enumerate(CLASSES))
    torch.testing.assert_close(
        quiet_logits(plain, batches[0]), quiet_logits(model, batches[0]), rtol=1e-4, atol=1e-5
    )


def macro_f1(actual, chosen):
    """Return the mean over classes of 2 / (1 / precision + 1 / recall)."""
    scores = []
    for number in range(len(CLASSES)):
        both = sum(a == c == number for a, c in zip(actual, chosen, strict=True))
        found, there = chosen.count(number), actual.count(number)
        precision, recall = both / max(1, found), both / max(1, there)
        scores.append(2 * precision * recall / (precision + recall) if both else 0.0)
    return sum(scores) / len(scores)


def exported(sim, folder):
    card = ModelCard(
        base_model="tiny", run_id="sim", strategy="hsplitlora", hand_back="residual",
        labels="device", rounds=ROUNDS, steps=6, devices=(), classes=CLASSES,
        accuracy_before=0.25, accuracy_after=0.75, f1_after=0.7,
    )  # fmt: skip
    weights = sim.model.classifier.weights
    classifier = TrainedClassifier(classes=CLASSES, weights=weights)
    base = sim.config.model.name
    return export_adapter(sim.model.update, base, folder, card=card, classifier=classifier)


def from_pretrained(name, **config):
    from transformers import AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' own deprecations
        return AutoModelForSequenceClassification.from_pretrained(name, **config).eval()


def opened(sim, adapter):
    from peft import PeftModel

    plain = from_pretrained(sim.config.model.name, num_labels=len(CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(plain, str(adapter)).eval()


def held_out(sim, device):
    return sim.devices[device].agent._participation._data.evaluation_batches(16)


def quiet_logits(model, batch):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits_of(model, batch)


def test_devices_classifiers_are_averaged_by_the_examples_that_each_learnt_from(tmp_path):
    plans = {"a": {"split_layer": 1, "batch": 5}, "b": {"split_layer": 2, "batch": 2}}
    sim = system(tmp_path, "bert", devices=plans, rounds=1)
    for device in plans:
        sim.add_device(device, lines=LINES)
    sim.run()
    sent = messages(sim.broker.traffic)
    results = {m.address.device: m.message for m in sent if isinstance(m.message, RoundResult)}
    assert {name: one.target_tokens for name, one in results.items()} == {"a": 50, "b": 20}
    trained = {d: arrays(one.classifier) for d, one in results.items()}
    for name, weight in sim.model.classifier.weights.items():
        mean = (50 * trained["a"][name] + 20 * trained["b"][name]) / 70
        assert relative(weight, mean) < 1e-6
        assert relative(trained["a"][name], trained["b"][name]) > 1e-3
    starts = [m.message for m in sent if isinstance(m.message, RoundStart)]
    assert all(arrays(one.classifier).keys() == mean_names(sim) for one in starts)


def arrays(weights):
    return {
        one.name: np.frombuffer(one.data.data, "<f4").reshape(one.data.shape) for one in weights
    }


def mean_names(sim):
    return sim.model.classifier.weights.keys()


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_coordinator_that_restarts_goes_on_with_its_classifier(labels, tmp_path):
    calm = three_devices(tmp_path / "calm", "bert", labels=labels, steps=3, optimizer="sgd")
    calm.run()
    shaken = three_devices(tmp_path / "shaken", "bert", labels=labels, steps=3, optimizer="sgd")
    shaken.run_to("round 2, step 4")
    shaken.restart_coordinator()
    shaken.run()
    for name, weight in calm.model.classifier.weights.items():
        assert relative(shaken.model.classifier.weights[name], weight) < 1e-5, name


@pytest.mark.parametrize("labels", ["device", "server"])
def test_lost_repeated_and_late_messages_leave_the_classifier_as_it_would_be(labels, tmp_path):
    faults = RandomFaults(3, drop=0.05, duplicate=0.1, delay=0.1)
    calm = three_devices(tmp_path / "calm", "gpt2", labels=labels, steps=3)
    calm.run()
    shaken = three_devices(tmp_path / "shaken", "gpt2", labels=labels, steps=3, faults=faults)
    shaken.run()
    for name, weight in calm.model.classifier.weights.items():
        assert relative(shaken.model.classifier.weights[name], weight) < 1e-4, name


def test_with_labels_on_the_devices_neither_text_nor_classes_are_on_the_broker(tmp_path):
    sim = three_devices(tmp_path, "gpt2", steps=3)
    sim.run()
    sent = list(messages(sim.broker.traffic))
    assert sum(1 for _ in secrets(sim)) > 500, "there is little to look for"
    assert not leaks(sim, sent)
    said = [m.message for m in sent if not isinstance(m.message, PieceBytes)]
    assert not [f for one in said for f in tensors_of(one) if not f.dtype.startswith("float")]
    # What is said of classes is how many of each a held-out part has, and were found.
    results = [m.message for m in sent if isinstance(m.message, EvaluationResult)]
    assert all(sum(c.actual for c in one.counts) == one.sequences for one in results)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_classifies(strategy, tmp_path):
    plans = {name: {"r": 4} for name in ("a", "b")}
    plan = {"batch": 3, "micro_batch": 2, "devices": plans}
    plan |= {"split_layer": 2} if strategy in ("hsplitlora", "splitlora") else {}
    changes = {"strategy": strategy, "plan": plan, "steps": 3}
    sim = system(tmp_path, "bert", devices=plans, **changes)
    new = sim.model.classifier.weights
    for device in plans:
        sim.add_device(device, lines=LINES)
    sim.run()
    scores = [line["eval/accuracy"] for line in sim.metrics() if "eval/accuracy" in line]
    assert len(scores) == ROUNDS + 1
    assert all(np.abs(w - new[n]).max() > 1e-4 for n, w in sim.model.classifier.weights.items())


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    sim = three_devices(tmp_path, "gpt2", steps=3)
    sim.run_to("round 2, step 3")
    (saved,) = [checkpoints.latest(sim.config.run_folder / "checkpoints")]
    assert saved is not None
    other = {"score.weight": np.zeros((7, 32), np.float32)}
    with pytest.raises(ConfigError, match=r"another number of training.classes"):
        sim.model.resume(dataclasses.replace(saved, classifier=other))
    with pytest.raises(ConfigError, match=r"another training.task"):
        sim.model.resume(dataclasses.replace(saved, classifier={}))
    sim.run()
