"""The outcome for people and for programs."""

from __future__ import annotations

import dataclasses
import json

from coordinator.evaluation.choices import Decoding
from coordinator.evaluation.metrics import Scores
from coordinator.evaluation.report import Evaluation, as_data, as_table

OUTCOME = Evaluation(
    adapter="runs/one/adapter",
    base="tiny",
    device="cpu",
    dtype="float32",
    prompts=1240,
    references=1441,
    max_length=256,
    target_tokens=5278,
    decoding=Decoding(),
    scores=Scores(
        values={"perplexity": 8.943, "bleu": 68.791, "nist": 8.54321, "cider": 2.5},
        left_out={"meteor": "no room", "rouge-l": "no room"},
        bleu_signature="nrefs:var|case:lc",
    ),
    seconds=61.2,
)


def test_the_table_has_the_papers_metrics_and_why_one_is_missing():
    assert as_table(OUTCOME).splitlines() == [
        "adapter: runs/one/adapter",
        "base:    tiny",
        "1,240 prompts, 1,441 references; float32 on cpu, 61 s",
        "decoding: 10 beams, length penalty 0.8, no 4-gram twice, at most 128 tokens",
        "",
        "perplexity       8.94",
        "BLEU            68.79",
        "NIST           8.5432",
        "CIDEr          2.5000",
        "",
        "no METEOR, ROUGE-L: no room",
    ]


def test_greedy_search_has_no_length_penalty_and_perplexity_alone_no_decoding():
    greedy = Decoding(beams=1, no_repeat_ngram=0, max_new_tokens=9)
    described = as_table(dataclasses.replace(OUTCOME, decoding=greedy))
    assert "decoding: greedy, at most 9 tokens" in described
    scores = Scores(values={"perplexity": 2.0})
    table = as_table(dataclasses.replace(OUTCOME, decoding=None, scores=scores))
    assert "decoding" not in table
    assert table.endswith("perplexity       2.00")


def test_programs_get_every_value_and_how_it_came():
    data = json.loads(json.dumps(as_data(OUTCOME)))
    assert data["metrics"] == {"perplexity": 8.943, "bleu": 68.791, "nist": 8.54321, "cider": 2.5}
    assert data["left_out"] == {"meteor": "no room", "rouge-l": "no room"}
    assert data["bleu_signature"] == "nrefs:var|case:lc"
    assert data["decoding"]["length_penalty"] == 0.8
    assert (data["prompts"], data["target_tokens"], data["seconds"]) == (1240, 5278, 61.2)
    assert "scores" not in data
