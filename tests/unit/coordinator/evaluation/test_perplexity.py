"""Perplexity counts the targets that training counts, and nothing else."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from coordinator import demo
from coordinator.evaluation import perplexity
from coordinator.evaluation.examples import Example, load
from coordinator.evaluation.opening import find_adapter, open_adapted
from coordinator.evaluation.perplexity import Likelihood
from coordinator.evaluation.progress import Progress
from coordinator.model_store import ModelStore
from edge_agent.records import Records
from edge_agent.vocabulary import Vocabulary
from shared.errors import DataError
from tests.support import exported_adapters

HELD_OUT = demo.shards()[0].held_out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return exported_adapters.write_adapter(tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(HELD_OUT.read_text().splitlines(keepends=True)[:12]))
    return path


def measured(adapter: Path, data: Path, *, max_length: int | None = None) -> Likelihood:
    adapted = open_adapted(find_adapter(adapter), device="cpu", max_length=max_length)
    return perplexity.measure(adapted, load([data]), Progress("perplexity"))


def as_an_agent_counts(adapter: Path, data: Path, folder: Path, *, max_length: int) -> Likelihood:
    """What the agent would be evaluated on, on the plain PEFT model, one sequence at a time."""
    store = ModelStore.open(str(demo.base_folder()), cache_folder=folder)
    tokenizer = demo.base_folder() / "tokenizer.json"
    sequences = Vocabulary(tokenizer, store.describe()).tokenise(
        Records.load(data), max_length=max_length
    )
    model = exported_adapters.opened_with_peft(adapter)
    nats = 0.0
    for start, end in zip(sequences.starts[:-1], sequences.starts[1:], strict=True):
        ids = torch.from_numpy(sequences.input_ids_M[start:end]).long()
        labels = torch.from_numpy(sequences.labels_M[start:end]).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        nats += float(functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
    return Likelihood(nats, sequences.target_tokens)


@pytest.mark.parametrize("max_length", [512, 60])
def test_it_is_what_an_agent_counts(adapter, data, tmp_path, max_length):
    """60 tokens cut some references and leave out others."""
    expected = as_an_agent_counts(adapter, data, tmp_path, max_length=max_length)
    found = measured(adapter, data, max_length=max_length)
    assert found.target_tokens == expected.target_tokens
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected.nats / expected.target_tokens))


def test_how_sequences_are_batched_changes_nothing(adapter, data, monkeypatch):
    together = measured(adapter, data)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 1)
    assert measured(adapter, data).nats == pytest.approx(together.nats, rel=1e-6)


def test_every_reference_of_a_prompt_counts(adapter, tmp_path):
    rows = [{"prompt": "a ->", "completion": text} for text in (" b", " c d", " b")]
    single, listed = tmp_path / "single.jsonl", tmp_path / "listed.jsonl"
    single.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed.write_text(json.dumps({"prompt": "a ->", "references": [" b", " c d", " b"]}))
    assert measured(adapter, single) == measured(adapter, listed)
    assert measured(adapter, single).target_tokens == 2 + 3 + 2


def test_references_beyond_the_length_are_left_out_and_said(adapter, data, caplog):
    with caplog.at_level(logging.WARNING):
        whole, cut = measured(adapter, data), measured(adapter, data, max_length=50)
    assert cut.target_tokens < whole.target_tokens
    assert "of 12 references begin after 50 tokens and do not count" in caplog.text
    with pytest.raises(DataError, match=r"12 of 12 references begin after 2 tokens: nothing to"):
        measured(adapter, data, max_length=2)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert Likelihood(1e6, 1).perplexity == math.inf
    assert Likelihood(0.0, 3).perplexity == 1.0


def test_an_example_without_files_is_as_good(adapter):
    adapted = open_adapted(find_adapter(adapter), device="cpu")
    one = Example(prompt="a ->", references=(" b",), where="here")
    assert perplexity.measure(adapted, [one], Progress("perplexity")).target_tokens == 2
