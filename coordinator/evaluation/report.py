"""An evaluation's outcome as a table for people, and as data for programs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.evaluation.choices import Decoding
from coordinator.evaluation.metrics import METRICS, Metric, Scores, by_reason

_NAMES: Mapping[Metric, str] = {
    "perplexity": "perplexity",
    "bleu": "BLEU",
    "nist": "NIST",
    "meteor": "METEOR",
    "rouge-l": "ROUGE-L",
    "cider": "CIDEr",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was evaluated, how, and the outcome.

    ``decoding`` None: nothing was decoded. ``target_tokens`` None: perplexity was not measured.
    """

    adapter: str
    base: str
    device: str
    dtype: str
    prompts: int
    references: int
    max_length: int
    target_tokens: int | None
    decoding: Decoding | None
    scores: Scores
    seconds: float


def as_data(outcome: Evaluation) -> dict[str, Any]:
    """Return the outcome as JSON holds it; BLEU, METEOR and ROUGE-L in per cent."""
    data = asdict(outcome)
    scores = data.pop("scores")
    return {**data, "metrics": scores.pop("values"), **scores}


def as_table(outcome: Evaluation) -> str:
    """Return the outcome for people: one line for each metric, and why one is missing."""
    scores = outcome.scores
    rows = [f"{_NAMES[one]:<12}{scores.values[one]:>9.{_digits(one)}f}" for one in _ordered(scores)]
    notes = [
        f"no {', '.join(_NAMES[one] for one in names)}: {reason}"
        for reason, names in by_reason(scores.left_out)
    ]
    return "\n".join([*_heading(outcome), "", *rows, *([""] if notes else []), *notes])


def _heading(outcome: Evaluation) -> list[str]:
    lines = [
        f"adapter: {outcome.adapter}",
        f"base:    {outcome.base}",
        (
            f"{outcome.prompts:,} prompts, {outcome.references:,} references; "
            f"{outcome.dtype} on {outcome.device}, {outcome.seconds:.0f} s"
        ),
    ]
    if outcome.decoding is not None:
        lines.append(f"decoding: {_described(outcome.decoding)}")
    return lines


def _described(how: Decoding) -> str:
    search = (
        f"{how.beams} beams, length penalty {how.length_penalty:g}" if how.beams > 1 else "greedy"
    )
    repeats = f", no {how.no_repeat_ngram}-gram twice" if how.no_repeat_ngram else ""
    return f"{search}{repeats}, at most {how.max_new_tokens} tokens"


def _ordered(scores: Scores) -> list[Metric]:
    return [metric for metric in METRICS if metric in scores.values]


def _digits(metric: Metric) -> int:
    return 4 if metric in {"nist", "cider"} else 2
