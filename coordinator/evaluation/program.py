"""One evaluation from beginning to end: read, open, measure, decode, score, write."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from coordinator.evaluation import examples as data
from coordinator.evaluation import metrics, perplexity
from coordinator.evaluation.choices import Wanted
from coordinator.evaluation.decoding import decode
from coordinator.evaluation.examples import Example
from coordinator.evaluation.metrics import Metric, Scores
from coordinator.evaluation.opening import AdaptedModel, find_adapter, open_adapted
from coordinator.evaluation.progress import Progress
from coordinator.evaluation.report import Evaluation
from shared.atomic import replace_file
from shared.clock import Clock
from shared.errors import StorageError


def evaluate(wanted: Wanted, clock: Clock) -> Evaluation:
    """Carry out an evaluation; write predictions to ``output``, where that is given.

    What cannot be used is found before anything is computed.

    Raises:
        ConfigError: a metric was asked for by name and cannot be computed here.
        DataError: the data cannot be used.
        ModelError: no adapter, or no base that it fits.
        MemoryFullError: a batch is too large.
        StorageError: ``output`` cannot be written.
    """
    started_s = clock.monotonic_s()
    chosen, missing = metrics.possible(wanted.metrics)
    examples = data.load(wanted.files, limit=wanted.limit)
    adapter = find_adapter(wanted.folder)
    if wanted.output is not None:
        _check_writable(wanted.output)
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    adapted = open_adapted(
        adapter,
        base=wanted.base,
        device=wanted.device,
        dtype=wanted.dtype,
        max_length=wanted.max_length,
    )
    likelihood = (
        perplexity.measure(adapted, examples, Progress("perplexity"))
        if "perplexity" in chosen
        else None
    )
    predictions = _predictions(wanted, adapted, examples, chosen)
    scores = _scores(chosen, predictions, examples)
    measured: dict[Metric, float] = {"perplexity": likelihood.perplexity} if likelihood else {}
    return Evaluation(
        adapter=str(adapter.path),
        base=wanted.base or adapter.base,
        device=str(adapted.device),
        dtype=wanted.dtype,
        prompts=len(examples),
        references=sum(len(example.references) for example in examples),
        max_length=adapted.max_length,
        target_tokens=likelihood.target_tokens if likelihood else None,
        decoding=None if predictions is None else wanted.decoding,
        scores=Scores(
            values={**measured, **scores.values},
            left_out={**missing, **scores.left_out},
            bleu_signature=scores.bleu_signature,
        ),
        seconds=clock.monotonic_s() - started_s,
    )


def _predictions(
    wanted: Wanted, adapted: AdaptedModel, examples: Sequence[Example], chosen: Sequence[Metric]
) -> tuple[str, ...] | None:
    """Return what the model writes, where a metric or ``output`` needs it."""
    if wanted.output is None and not set(chosen) - {"perplexity"}:
        return None
    predictions = decode(adapted, examples, wanted.decoding, Progress("decoding"))
    if wanted.output is not None:
        lines = [_line(*pair) for pair in zip(examples, predictions, strict=True)]
        replace_file(wanted.output, "".join(lines).encode())
    return predictions


def _check_writable(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror}") from error
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise StorageError(f"{output} cannot be written: choose another file for --output")


def _line(example: Example, prediction: str) -> str:
    whole = {
        "prompt": example.prompt,
        "prediction": prediction,
        "references": list(example.references),
    }
    return json.dumps(whole, ensure_ascii=False) + "\n"


def _scores(
    chosen: Sequence[Metric], predictions: Sequence[str] | None, examples: Sequence[Example]
) -> Scores:
    if predictions is None:
        return Scores()
    return metrics.score(chosen, predictions, [example.references for example in examples])
