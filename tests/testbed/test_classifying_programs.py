"""The real programs classify: which kind of place a sentence of E2E is about.

One device's part is stated, the other's is planned from what its own probe measures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from coordinator import demo
from tests.support.brokers import free_port
from tests.testbed import small_run
from tests.testbed.in_process import coordinator_main
from tests.testbed.system import System

CLASSES = ["coffee shop", "pub", "restaurant"]
DEVICES = ("workstation", "nano")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),  # the first test waits for a whole run, with its measuring
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def write_labelled(source: Path, target: Path, *, count: int) -> Path:
    """Write sentences that name the kind of place that they are about, with that kind."""
    rows = []
    for line in source.read_text().splitlines():
        row = json.loads(line)
        kind = re.search(r"Type : ([a-z ]+?) [|-]", row["prompt"])
        if kind and kind.group(1) in CLASSES and kind.group(1) in row["completion"]:
            rows.append({"text": row["completion"].strip(), "label": kind.group(1)})
    target.write_text("\n".join(json.dumps(row) for row in rows[:count]))
    return target


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Iterator[tuple[System, list[Path]]]:
    """A finished run of two devices, and their held-out files."""
    folder = tmp_path_factory.mktemp("classifying")
    port = free_port()
    shards = {shard.device: shard for shard in demo.shards()}
    with System(folder, f"mqtt://127.0.0.1:{port}") as system:
        settings = small_run.settings(
            broker=None,
            embedded_broker={"port": port, "prefer": "amqtt"},
            devices={"min": 2, "expected": 2, "lost_after_s": 30},
            rounds={"count": 2, "steps": 6},
            plan={"batch": 6, "devices": {"workstation": {"split_layer": 4}}},
            training={
                "task": "classification",
                "classes": CLASSES,
                "max_length": 64,
                "wire_dtype": "float32",
            },
            export={"merged": True},
        )
        coordinator = system.coordinator(settings)
        agents, held_out = [], []
        for name in DEVICES:
            shard = shards[name]
            data = write_labelled(shard.training, folder / f"{name}.jsonl", count=90)
            test = write_labelled(shard.held_out, folder / f"{name}-test.jsonl", count=20)
            held_out.append(test)
            flags = ("--evaluation-data", str(test), "--threads", "1")
            agents.append(system.agent(name, data, *flags))
        codes = [coordinator.wait(300), *(agent.wait(60) for agent in agents)]
        assert codes == [0, 0, 0], coordinator.text() + "".join(a.text() for a in agents)
        yield system, held_out


def test_a_run_learns_to_tell_classes_apart(ran):
    system, _ = ran
    summary = system.summary()
    evaluated = [line for line in system.metrics() if "eval/loss" in line]
    assert evaluated[-1]["eval/loss"] < 0.95 * evaluated[0]["eval/loss"]
    assert summary["accuracy_after"] == evaluated[-1]["eval/accuracy"]
    assert summary["f1_after"] == evaluated[-1]["eval/f1"]
    assert summary["perplexity_after"] is None
    assert "held-out accuracy" in (system.folder / "coordinator.log").read_text()
    assert "Held-out accuracy by steps" in (system.run_folder / "report.html").read_text()


def test_its_adapter_has_the_loss_and_the_accuracy_that_it_reported(ran):
    system, held_out = ran
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        small_run.BASE, num_labels=len(CLASSES)
    )
    opened = PeftModel.from_pretrained(base, str(system.run_folder / "adapter")).eval()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(
        system.run_folder / "merged"
    ).eval()
    assert merged.config.id2label == dict(enumerate(CLASSES))
    last = [line for line in system.metrics() if "eval/loss" in line][-1]
    for model in (opened, merged):
        loss, accuracy = judged(model, held_out)
        assert loss == pytest.approx(last["eval/loss"], rel=1e-3)
        assert accuracy == pytest.approx(last["eval/accuracy"])


def judged(model: torch.nn.Module, files: list[Path]) -> tuple[float, float]:
    """Return loss and accuracy of a plain model, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_run.BASE)
    losses, right = [], []
    for row in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        label = torch.tensor([CLASSES.index(row["label"])])
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits, label)))
        right.append(int(logits.argmax()) == int(label))
    return float(np.mean(losses)), float(np.mean(right))


def test_the_adapter_of_the_last_checkpoint_can_be_written_again(ran, tmp_path):
    system, _ = ran
    ended = coordinator_main("export", str(system.run_folder), "--to", str(tmp_path / "again"))
    assert ended.code == 0, ended.words
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert "accuracy on held-out texts" in (tmp_path / "again" / "README.md").read_text()


def test_the_adapter_writes_no_text_and_evaluate_says_so(ran):
    system, _ = ran
    text = demo.shards()[0].held_out
    ended = coordinator_main("evaluate", str(system.run_folder), "--data", str(text))
    assert ended.code != 0
    assert "CAUSAL_LM" in ended.words
