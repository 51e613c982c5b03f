"""What an evaluation can be told, and the flags that tell it. Imports no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from coordinator.evaluation.metrics import METRICS, Metric
from shared.terms import ComputeDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How to search; the defaults are the LoRA and SplitLoRA papers' but ``max_new_tokens``.

    The best of ``beams`` (1: greedy) is that with the highest log-probability divided by its
    length to the power of ``length_penalty``. ``no_repeat_ngram``: no run of so many tokens
    comes twice in an answer (0: may). ``batch``: prompts at once.
    """

    beams: int = 10
    length_penalty: float = 0.8
    no_repeat_ngram: int = 4
    max_new_tokens: int = 128
    batch: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to evaluate and how; what None means, the help of `add_flags` says."""

    folder: Path
    files: Sequence[Path]
    base: str | None = None
    metrics: Sequence[Metric] | None = None
    limit: int | None = None
    max_length: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    device: str | None = None
    dtype: ComputeDtype = "float32"
    threads: int | None = None
    output: Path | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``hsplit-coordinator evaluate``."""
    add = parser.add_argument
    add("folder", type=Path, metavar="ADAPTER", help="a PEFT adapter's folder, or a run's folder")
    lines = "JSON lines of prompt and completion (or references), or the E2E challenge's csv"
    add("--data", type=Path, nargs="+", required=True, metavar="FILE", help=lines)
    add("--model", help="base model (default: the one that the adapter names)")
    computed = "(default: all that this machine can compute)"
    names = f"of {', '.join(METRICS)} {computed}"
    add("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=names)
    add("--limit", type=_positive, metavar="N", help="only the first N prompts")
    cut = "tokens of the longest sequence for perplexity (default: the run's, else 512)"
    add("--max-length", type=_positive, metavar="N", help=cut)
    _add_decoding(parser)
    add("--device", help="where to compute, such as cuda:1 (default: CUDA if there is one)")
    add("--dtype", choices=get_args(ComputeDtype), default="float32")
    add("--threads", type=_positive, metavar="N", help="of the CPU (default: what torch takes)")
    written = "write prompts, predictions and references to it, as JSON lines"
    add("--output", type=Path, metavar="FILE", help=written)
    add("--json", action="store_true", help="print the outcome for programs")


def wanted(arguments: argparse.Namespace) -> Wanted:
    """Return what the flags of `add_flags` say."""
    return Wanted(
        folder=arguments.folder,
        files=arguments.data,
        base=arguments.model,
        metrics=arguments.metrics,
        limit=arguments.limit,
        max_length=arguments.max_length,
        decoding=Decoding(
            beams=arguments.beams,
            length_penalty=arguments.length_penalty,
            no_repeat_ngram=arguments.no_repeat_ngram,
            max_new_tokens=arguments.max_answer,
            batch=arguments.batch,
        ),
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        output=arguments.output,
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    default = Decoding()
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add("--beams", type=_positive, default=default.beams, metavar="N", help=f"1 is greedy {shown}")
    divisor = f"scores are divided by length to this power {shown}"
    add("--length-penalty", type=_finite, default=default.length_penalty, metavar="X", help=divisor)
    repeats = f"no run of so many tokens twice in an answer; 0: allowed {shown}"
    add(
        "--no-repeat-ngram", type=_count, default=default.no_repeat_ngram, metavar="N", help=repeats
    )
    longest = f"tokens of the longest answer {shown}"
    add("--max-answer", type=_positive, default=default.max_new_tokens, metavar="N", help=longest)
    add(
        "--batch",
        type=_positive,
        default=default.batch,
        metavar="N",
        help=f"prompts at once {shown}",
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number
