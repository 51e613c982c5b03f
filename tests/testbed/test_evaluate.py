"""``hsplit-coordinator evaluate`` on a finished run, from the command line to what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from coordinator import demo
from tests.support import exported_adapters
from tests.testbed.in_process import Ended, coordinator_main

HAS_JAVA = shutil.which("java") is not None
WORDS = {"perplexity", "bleu", "nist"}
CAPTIONS = {"meteor", "rouge-l", "cider"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return exported_adapters.write_run(tmp_path_factory.mktemp("runs") / "my-run")


@pytest.fixture
def data(tmp_path) -> Path:
    lines = demo.shards()[2].held_out.read_text().splitlines(keepends=True)
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(lines[:3] + lines[:1]))
    return path


def evaluate(*arguments: str | Path) -> Ended:
    quick = ("--beams", "2", "--max-answer", "12", "--device", "cpu", "--threads", "1")
    return coordinator_main("evaluate", *map(str, arguments), *quick)


def test_a_run_is_evaluated_for_programs(run, data, tmp_path):
    output = tmp_path / "new" / "predictions.jsonl"
    ended = evaluate(run, "--data", data, "--metrics", *WORDS, "--json", "--output", output)
    assert ended.code == 0, ended.words
    found = json.loads(ended.output)
    assert found["metrics"].keys() == WORDS
    assert (found["prompts"], found["references"], found["max_length"]) == (3, 4, 128)
    assert found["decoding"]["beams"] == 2
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(line["references"]) for line in written] == [2, 1, 1]
    assert written[0]["prompt"] == json.loads(data.read_text().splitlines()[0])["prompt"]
    assert all(line["prediction"] == line["prediction"].strip() for line in written)
    assert any(line["prediction"] for line in written)


def test_perplexity_alone_decodes_nothing(run, data):
    ended = evaluate(run / "adapter", "--data", data, data, "--metrics", "perplexity")
    assert ended.code == 0, ended.words
    assert "3 prompts, 8 references" in ended.output
    assert "decoding" not in ended.output


def test_a_limit_is_of_prompts(run, data):
    ended = evaluate(run, "--data", data, "--limit", "1", "--metrics", "nist")
    assert "1 prompts, 2 references" in ended.output
    assert "NIST" in ended.output


def test_threads_are_those_of_the_flag(run, data):
    flags = ("--data", str(data), "--limit", "1", "--metrics", "perplexity", "--device", "cpu")
    assert coordinator_main("evaluate", str(run), *flags, "--threads", "2").code == 0
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_all_metrics_are_reported_or_why_not(run, data):
    ended = evaluate(run, "--data", data, "--json")
    assert ended.code == 0, ended.words
    found = json.loads(ended.output)
    assert found["metrics"].keys() == (WORDS | CAPTIONS if HAS_JAVA else WORDS)
    assert found["left_out"].keys() == (set() if HAS_JAVA else CAPTIONS)
    assert all(value >= 0 for value in found["metrics"].values())


def test_without_java_the_others_are_reported(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = evaluate(run, "--data", data)
    assert ended.code == 0, ended.words
    assert "NIST" in ended.output
    assert "no METEOR, ROUGE-L, CIDEr: Java is not installed" in ended.output
    refused = evaluate(run, "--data", data, "--metrics", "meteor")
    assert refused.code == 2
    assert "no meteor: Java is not installed" in refused.words


@pytest.mark.parametrize(
    ("change", "code", "part"),
    [
        ({"adapter": "nowhere"}, 4, "nowhere: no such folder; give a PEFT adapter's"),
        ({"data": "nowhere.jsonl"}, 3, "nowhere.jsonl: no such file"),
        ({"model": "./nowhere"}, 4, "no such folder; check --model"),
        ({"max-answer": "500"}, 3, ":1: a prompt of"),
        ({"output": "."}, 18, "choose another file for --output"),
        ({"metrics": "bert"}, 2, "invalid choice: 'bert'"),
        ({"beams": "0"}, 2, "'0' is not a whole number from 1 on"),
        ({"no-repeat-ngram": "-1"}, 2, "'-1' is not a whole number from 0 on"),
        ({"length-penalty": "nan"}, 2, "'nan' is not a number"),
        ({"device": "cuda:99"}, 2, "device cuda:99 is not there"),
    ],
)
def test_bad_input_is_said(run, data, change, code, part):
    flags = {"data": str(data), "beams": "1", "device": "cpu", **change}
    adapter = flags.pop("adapter", str(run))
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    ended = coordinator_main("evaluate", adapter, *words)
    assert ended.code == code, ended.words
    assert part in ended.words
    assert "Traceback" not in ended.words
