"""Which metrics there are, which of them this machine can compute, and their values."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from coordinator.evaluation.nist import nist
from shared.errors import ConfigError

Metric: TypeAlias = Literal["perplexity", "bleu", "nist", "meteor", "rouge-l", "cider"]

METRICS: tuple[Metric, ...] = get_args(Metric)
OF_WORDS: frozenset[Metric] = frozenset({"bleu", "nist"})
OF_CAPTIONS: frozenset[Metric] = frozenset({"meteor", "rouge-l", "cider"})

_EXTRA = "pip install 'hsplit[evaluation]'"
_JAVA = (
    "Java is not installed, and the words that METEOR, ROUGE-L and CIDEr count are found by a "
    "Java program; install default-jre-headless, say"
)
_PER_CENT = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Values in the papers' units: BLEU, METEOR and ROUGE-L in per cent.

    ``left_out``: why a metric has no value. ``bleu_signature``: sacrebleu's.
    """

    values: Mapping[Metric, float] = field(default_factory=dict)
    left_out: Mapping[Metric, str] = field(default_factory=dict)
    bleu_signature: str | None = None


def by_reason(left_out: Mapping[Metric, str]) -> list[tuple[str, list[Metric]]]:
    """Return each reason with the metrics that are left out for it."""
    return [
        (reason, [metric for metric, own in left_out.items() if own == reason])
        for reason in dict.fromkeys(left_out.values())
    ]


def missing_for(metrics: Collection[Metric]) -> dict[Metric, str]:
    """Return which of ``metrics`` cannot be computed on this machine, and what they need."""
    missing: dict[Metric, str] = {}
    for metric in METRICS:
        if metric in metrics and (reason := _missing(metric)):
            missing[metric] = reason
    return missing


def possible(wanted: Sequence[Metric] | None) -> tuple[tuple[Metric, ...], dict[Metric, str]]:
    """Return what can be computed of ``wanted`` (None: of all), and why the rest cannot.

    Raises:
        ConfigError: a metric was asked for by name and cannot be computed here.
    """
    chosen = [metric for metric in METRICS if wanted is None or metric in wanted]
    missing = missing_for(chosen)
    if wanted is not None and missing:
        said = "; ".join(f"no {', '.join(names)}: {why}" for why, names in by_reason(missing))
        raise ConfigError(f"{said}; or leave it out of --metrics")
    return tuple(metric for metric in chosen if metric not in missing), missing


def score(
    metrics: Collection[Metric], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Scores:
    """Return the NLG metrics among ``metrics`` of predictions, one list of references to each."""
    of_words = _score_words(metrics, predictions, references)
    of_captions = _score_captions(metrics, predictions, references)
    return Scores(
        values={**of_words.values, **of_captions.values},
        left_out=of_captions.left_out,
        bleu_signature=of_words.bleu_signature,
    )


def _missing(metric: Metric) -> str | None:
    if metric in OF_WORDS and not _installed("sacrebleu"):
        return f"sacrebleu is not installed; {_EXTRA}"
    if metric in OF_CAPTIONS and not _installed("pycocoevalcap"):
        return f"pycocoevalcap is not installed; {_EXTRA}"
    if metric in OF_CAPTIONS and shutil.which("java") is None:
        return _JAVA
    return None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _score_words(
    metrics: Collection[Metric], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Scores:
    if not OF_WORDS & set(metrics):
        return Scores()
    # Inside: an extra, which may not be installed.
    from coordinator.evaluation.bleu import bleu, words_of  # noqa: PLC0415

    values: dict[Metric, float] = {}
    signature = None
    if "bleu" in metrics:
        found = bleu(predictions, references)
        values["bleu"], signature = found.value, found.signature
    if "nist" in metrics:
        values["nist"] = nist(words_of(predictions), [words_of(texts) for texts in references])
    return Scores(values=values, bleu_signature=signature)


def _score_captions(
    metrics: Collection[Metric], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Scores:
    wanted = [metric for metric in METRICS if metric in OF_CAPTIONS & set(metrics)]
    if not wanted:
        return Scores()
    from coordinator.evaluation import captions  # noqa: PLC0415 - as in `_score_words`

    scorers: dict[Metric, Callable[[captions.TokenisedPairs], float]] = {
        "meteor": lambda pairs: _PER_CENT * captions.meteor(pairs),
        "rouge-l": lambda pairs: _PER_CENT * captions.rouge_l(pairs),
        "cider": captions.cider,
    }
    values: dict[Metric, float] = {}
    failed: dict[Metric, str] = {}
    pairs = None
    for metric in wanted:
        try:
            pairs = pairs or captions.TokenisedPairs.of(predictions, references)
            values[metric] = scorers[metric](pairs)
        except captions.JavaError as error:
            failed[metric] = str(error)
    return Scores(values=values, left_out=failed)
