"""The comparison's figures in rows: how low each method came, how soon, and at what price."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coordinator.report import wording
from coordinator.report.charts import Chart
from coordinator.report.page import Row, Section, Table
from tests.testbed.comparison.outcomes import (
    BYTES,
    PERPLEXITY,
    SECONDS,
    SUBJECT,
    Measure,
    Method,
    Spread,
    methods,
)
from tests.testbed.comparison.results import Comparison


def result(comparison: Comparison, target: float) -> Section:
    """Return the strategies' and references' figures, and what follows from them in words."""
    strategies = methods(comparison, "strategy")
    shown = [*strategies, *methods(comparison, "reference")]
    return Section(
        title="Result",
        points=_in_words(strategies, target),
        tables=[_table(shown, _subject(comparison), target)] if shown else [],
    )


def ablations(comparison: Comparison, target: float, charts: Sequence[Chart]) -> Section:
    """Return the same of what lacks a part of `SUBJECT`, beside `charts` of it."""
    lacking = methods(comparison, "ablation")
    subject = _subject(comparison)
    shown = [*([subject] if subject else []), *lacking]
    return Section(
        title="Ablations",
        text=f"{SUBJECT} without one of its parts each.",
        tables=[_table(shown, subject, target)] if lacking else [],
        charts=charts,
    )


def perplexity(value: float) -> str:
    """Return two decimals, for differences are small; three digits of large ones."""
    return f"{value:.2f}" if math.isfinite(value) and abs(value) < 100 else wording.number(value)


def seconds(value: float) -> str:
    """Return ``12.3 s``, ``4 min 10 s``, ``3 h 20 min``."""
    return wording.seconds(value)


def _subject(comparison: Comparison) -> Method | None:
    return next((m for m in methods(comparison, "strategy") if m.name == SUBJECT), None)


def _table(shown: Sequence[Method], subject: Method | None, target: float) -> Table:
    to = f"perplexity {perplexity(target)}"
    return Table(
        columns=(
            *("method", "final\nperplexity", f"against\n{SUBJECT}"),
            *(f"time to\n{to}", f"times\n{SUBJECT}", f"bytes to\n{to}", f"times\n{SUBJECT}"),
            *("peak memory\nof a device", "largest\naggregation error"),
        ),
        rows=[Row(_cells(method, subject, target), _note(method)) for method in shown],
        note="Means over seeds, in brackets the least and the largest.",
    )


def _cells(method: Method, subject: Method | None, target: float) -> tuple[str, ...]:
    final = method.final(PERPLEXITY)
    return (
        method.name,
        _spread(final) if final.count else "diverged",
        "–" if method.name == SUBJECT else _change(final.mean, subject),
        *_cost(method, subject, target, measure=SECONDS),
        *_cost(method, subject, target, measure=BYTES),
        wording.bytes_(max(method.peak_memory_bytes.values(), default=math.nan)),
        _error(method),
    )


def _cost(
    method: Method, subject: Method | None, target: float, *, measure: Measure
) -> tuple[str, str]:
    own = method.until(target, measure)
    if own.count == 0:
        return "not reached", "–"
    if own.high == 0:  # nothing was sent
        return "0", "–"
    words = wording.bytes_(own.mean) if measure is BYTES else seconds(own.mean)
    if own.count < len(method.runs):
        return f"{words} ({own.count} of {len(method.runs)} seeds)", "–"
    its = subject.until(target, measure) if subject else Spread.of([])
    return words, f"{own.mean / its.mean:.2f}" if its.mean > 0 else "–"


def _spread(found: Spread) -> str:
    if found.count < 2:
        return perplexity(found.mean)
    return f"{perplexity(found.mean)} ({perplexity(found.low)} to {perplexity(found.high)})"


def _change(value: float, subject: Method | None) -> str:
    share = value / subject.final(PERPLEXITY).mean - 1 if subject else math.nan
    return f"{share:+.1%}" if math.isfinite(share) else "–"


def _error(method: Method) -> str:
    largest = method.largest_error
    return "0" if largest == 0 else "–" if math.isnan(largest) else f"{largest:.2g}"


def _note(method: Method) -> str:
    notes = list(dict.fromkeys(run.note for run in method.runs if run.note))
    if 0 < method.diverged < len(method.runs):
        notes.insert(0, f"Diverged with {method.diverged} of {len(method.runs)} seeds.")
    return " ".join(notes)


def _in_words(strategies: Sequence[Method], target: float) -> list[str]:
    """Return who ended lower than `SUBJECT` and who higher, and who was sooner."""
    subject = next((method for method in strategies if method.name == SUBJECT), None)
    others = [method for method in strategies if method is not subject]
    if subject is None or not others:
        return []
    words = [
        _compared(
            f"At the end, perplexity {perplexity(subject.final(PERPLEXITY).mean)} of {SUBJECT}",
            {method.name: method.final(PERPLEXITY) for method in others},
            subject.final(PERPLEXITY),
        )
    ]
    its = subject.until(target, SECONDS)
    times = {method.name: method.until(target, SECONDS) for method in others}
    late = [name for name, time in times.items() if time.count == 0]
    ratios = [time.mean / its.mean for time in times.values() if time.count and its.mean > 0]
    if ratios:
        words.append(
            f"To perplexity {perplexity(target)}, {SUBJECT} took {seconds(its.mean)}, the others "
            f"{min(ratios):.2f} to {max(ratios):.2f} times that."
        )
    if late:
        words.append(f"Not so low came {', '.join(late)}.")
    return words


def _compared(lead: str, others: dict[str, Spread], subject: Spread) -> str:
    """Return three lists: who is above whatever the seed, who below, and who cannot be told."""
    higher = [name for name, one in others.items() if one.low > subject.high or one.count == 0]
    lower = [name for name, one in others.items() if one.high < subject.low]
    rest = [name for name in others if name not in (*higher, *lower)]
    groups = {"higher with every seed": higher, "lower with every seed": lower}
    groups["not told apart over these seeds"] = rest
    parts = [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]
    return f"{lead}; {'; '.join(parts)}."
