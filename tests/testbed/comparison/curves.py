"""The comparison's charts: learning by steps, time and bytes, aggregation errors, devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.report import derived
from coordinator.report.charts import INK, MUTED, SAFE_PALETTE, Chart, Grid, Key, Line, Scale
from coordinator.report.drawing import grid_chart, line_chart
from coordinator.report.page import Section
from coordinator.report.sections import drawn
from tests.testbed.comparison.outcomes import (
    BYTES,
    LOSS,
    PERPLEXITY,
    SECONDS,
    STEPS,
    SUBJECT,
    Curve,
    Measure,
    Method,
    methods,
    worth_seeing,
)
from tests.testbed.comparison.results import Comparison, MethodRun, RoundPoint

_TARGETS = 60
_STEEP = 5.0
"""Largest over smallest, from which a perplexity's axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class _Along:
    """One way to place points."""

    measure: Measure
    unit: str
    title: str
    log: bool = False


def sections(comparison: Comparison) -> list[Section]:
    """Return how the strategies learnt, and what their aggregations lost."""
    shown = methods(comparison, "strategy", "reference")
    keys = keys_of(shown)
    return [
        Section(
            title="Learning",
            text="On held-out text. Each name stands at the end of its curve.",
            charts=drawn(
                *(_learning(shown, keys, along, PERPLEXITY) for along in _ways(shown)),
                *(_learning(shown, keys, along, LOSS) for along in _ways(shown)),
                _ratios(methods(comparison, "strategy"), keys),
            ),
        ),
        Section(
            title="Rounds",
            charts=drawn(
                _rounds(
                    shown,
                    keys,
                    "Aggregation error",
                    of=lambda point: point.aggregation_error or math.nan,
                    scale=Scale(x="round", y="relative error", log=True),
                    note="A method without a curve lost nothing.",
                ),
                _rounds(
                    shown,
                    keys,
                    "Training loss",
                    of=lambda point: point.training_loss,
                    scale=Scale(x="round", y="nats a token"),
                ),
            ),
        ),
    ]


def ablations(comparison: Comparison) -> tuple[Chart, ...]:
    """Return perplexity of `SUBJECT` whole and of what lacks a part of it; none without any."""
    lacking = methods(comparison, "ablation")
    if not lacking:
        return ()
    whole = [one for one in methods(comparison, "strategy") if one.name == SUBJECT]
    shown = [*whole, *lacking]
    keys = keys_of(shown)
    return drawn(*(_learning(shown, keys, along, PERPLEXITY) for along in _ways(shown)))


def devices(comparison: Comparison) -> Section:
    """Return what each method asked of each device."""
    shown = methods(comparison, "strategy", "ablation", "reference")
    first = {method.name: method.runs[0] for method in shown}
    memory = {
        method.name: {device: size / 1e9 for device, size in method.peak_memory_bytes.items()}
        for method in shown
    }
    layers = {name: run.split_layers for name, run in first.items()}
    ranks = {name: run.ranks for name, run in first.items()}
    return Section(
        title="Devices",
        charts=drawn(
            _by_device("Peak memory, GB", memory, note="The largest of all seeds."),
            _by_device("Split layer", layers, note=f"At the end, seed {_first_seed(shown)}."),
            _by_device("Largest rank", ranks, note=f"At the end, seed {_first_seed(shown)}."),
        ),
    )


def keys_of(shown: Sequence[Method]) -> dict[str, Key]:
    """Return each method's colour and dash: what is compared in ink, a reference muted."""
    others = [method.name for method in shown if method.name != SUBJECT]
    compared = [method.name for method in shown if method.kind != "reference"]
    keys = {name: Key(name, MUTED, "dotted") for name in others}
    for i, name in enumerate(name for name in compared if name != SUBJECT):
        dash = ("solid", "dashed", "dashdot")[i // len(SAFE_PALETTE) % 3]
        keys[name] = Key(name, SAFE_PALETTE[i % len(SAFE_PALETTE)], dash)
    return {SUBJECT: Key(SUBJECT, INK), **keys}


def _ways(shown: Sequence[Method]) -> tuple[_Along, ...]:
    points = [point for method in shown for run in method.runs for point in run.points]
    time = derived.axis_of(0.0, max((point.seconds for point in points), default=0.0))
    return (
        _Along(STEPS, "optimizer steps", "by steps"),
        _Along(lambda point: time.of(point.seconds), time.label, "by emulated time", log=True),
        _Along(BYTES, "bytes", "by bytes over the network", log=True),
    )


def _learning(
    shown: Sequence[Method], keys: Mapping[str, Key], along: _Along, measure: Measure
) -> Chart | None:
    curves = {one.name: _moving(one.curve(along.measure, measure), along) for one in shown}
    curves = {name: curve for name, curve in curves.items() if len(curve.xs) > 1}
    highest = worth_seeing(list(curves.values()))
    name = "Perplexity" if measure is PERPLEXITY else "Loss"
    return line_chart(
        f"{name} {along.title}",
        [_line(curve, keys[method]) for method, curve in curves.items()],
        scale=Scale(
            x=along.unit,
            y="perplexity" if measure is PERPLEXITY else "nats a token",
            whole_x=along.measure is STEPS,
            log=measure is PERPLEXITY and _is_steep(curves.values(), highest),
            log_x=along.log,
            highest=highest,
        ),
        note="The first evaluations are higher.",
        named=True,
    )


def _moving(curve: Curve, along: _Along) -> Curve:
    """Return a curve from where it can be placed: on a logarithmic axis there is no 0."""
    kept = [i for i, x in enumerate(curve.xs) if x > 0 or not along.log]
    return Curve(*([part[i] for i in kept] for part in (curve.xs, curve.ys, curve.low, curve.high)))


def _is_steep(curves: object, highest: float | None) -> bool:
    ys = [y for curve in curves for y in curve.low if math.isfinite(y) and y > 0]
    return bool(ys) and highest is not None and highest > _STEEP * min(ys)


def _line(curve: Curve, key: Key) -> Line:
    return Line(xs=curve.xs, ys=curve.ys, key=key, band=(curve.low, curve.high))


def _ratios(strategies: Sequence[Method], keys: Mapping[str, Key]) -> Chart | None:
    """Return how many times as long as `SUBJECT` each needs to every perplexity."""
    subject = next((method for method in strategies if method.name == SUBJECT), None)
    if subject is None:
        return None
    known = [y for y in subject.curve(STEPS, PERPLEXITY).ys if math.isfinite(y) and y > 0]
    if len(known) < 2:
        return None
    targets = np.geomspace(min(known), known[1], _TARGETS).tolist()
    lines = []
    for method in strategies:
        ratios = [_ratio(method, subject, target) for target in targets]
        lines.append(Line(xs=targets, ys=ratios, key=keys[method.name]))
    return line_chart(
        f"Time to a perplexity, times {SUBJECT}'s",
        [line for line in lines if np.isfinite(line.ys).any()],
        scale=Scale(x="perplexity to be reached", y="times", whole_x=False, log=True, log_x=True),
        note="A curve ends on the left where not every seed came so low.",
        named=True,
    )


def _ratio(method: Method, subject: Method, target: float) -> float:
    own, its = (one.until(target, SECONDS) for one in (method, subject))
    whole = own.count == len(method.runs) and its.count == len(subject.runs)
    return own.mean / its.mean if whole and its.mean > 0 and own.mean > 0 else math.nan


def _rounds(
    shown: Sequence[Method],
    keys: Mapping[str, Key],
    title: str,
    *,
    of: Callable[[RoundPoint], float],
    scale: Scale,
    note: str = "",
) -> Chart | None:
    def values(run: MethodRun) -> list[tuple[int, float]]:
        return [(point.round, of(point)) for point in run.rounds]

    curves = {method.name: method.by_round(values) for method in shown}
    lines = [_line(curve, keys[name]) for name, curve in curves.items() if curve.xs]
    return line_chart(title, lines, scale=scale, note=note, named=True)


def _by_device(title: str, values: Mapping[str, Mapping[str, float]], *, note: str) -> Chart | None:
    names = list(dict.fromkeys(device for own in values.values() for device in own))
    rows = [name for name, own in values.items() if own]
    values_RC = np.array([[values[row].get(name, np.nan) for name in names] for row in rows])
    if not values_RC.size:
        return None
    grid = Grid(rows=rows, columns=names, values_RC=values_RC.astype(float), x="device")
    return grid_chart(title, grid, note=note)


def _first_seed(shown: Sequence[Method]) -> int:
    return next((run.seed for method in shown for run in method.runs), 0)
