"""What the page shows of the run as a whole: learning, pace, traffic, aggregation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.report import derived
from coordinator.report.charts import INK, MUTED, PALETTE, Chart, Key, Line, Scale
from coordinator.report.drawing import line_chart
from coordinator.report.page import Section
from coordinator.report.records import Point, RunRecords
from coordinator.report.wording import seconds

UP, DOWN = Key("up", PALETTE[0]), Key("down", PALETTE[1])


@dataclass(frozen=True, slots=True)
class _Abscissa:
    """One way to place points: by steps or by time."""

    label: str
    title: str
    of: Callable[[Point], float]
    whole: bool


def drawn(*charts: Chart | None) -> tuple[Chart, ...]:
    """Return the charts that have something to show."""
    return tuple(chart for chart in charts if chart is not None)


def values(points: Sequence[Point]) -> list[float]:
    """Return the points' values."""
    return [point.value for point in points]


def steps(points: Sequence[Point]) -> list[float]:
    """Return the points' steps."""
    return [float(point.step) for point in points]


def rounds(points: Sequence[Point]) -> list[float]:
    """Return the points' rounds."""
    return [float(point.round) for point in points]


# --- learning ---------------------------------------------------------------------------------


def learning(records: RunRecords, keys: dict[str, Key]) -> Section:
    """Return how good held-out data came out, and training loss, by steps and by time."""
    time = derived.time_axis(records)
    by_steps = _Abscissa("optimizer steps", "by steps", lambda point: float(point.step), whole=True)
    by_time = _Abscissa(time.label, "by time", lambda point: time.of(point.time_s), whole=False)
    what = derived.held_out_measure(records)
    measured = records.of_devices(what).keys() & keys.keys()
    return Section(
        title="Learning",
        charts=drawn(
            *(_held_out(records, keys, along, what=what) for along in (by_steps, by_time)),
            *(_training_loss(records, along) for along in (by_steps, by_time)),
        ),
        keys=[keys[name] for name in sorted(measured)],
    )


def _held_out(
    records: RunRecords, keys: dict[str, Key], along: _Abscissa, *, what: str
) -> Chart | None:
    lines = [
        Line(xs=[along.of(p) for p in points], ys=values(points), key=keys[name], in_legend=False)
        for name, points in records.of_devices(what).items()
        if name in keys
    ]
    points = records.series(f"eval/{what}")
    mean = Line(
        xs=[along.of(p) for p in points], ys=values(points), key=Key("all held-out text", INK)
    )
    scale = Scale(x=along.label, y=what, whole_x=along.whole, log=_spans(values(points), times=30))
    return line_chart(f"Held-out {what} {along.title}", [*lines, mean], scale=scale)


def _training_loss(records: RunRecords, along: _Abscissa) -> Chart | None:
    scale = Scale(x=along.label, y="nats a token", whole_x=along.whole)
    title = f"Training loss {along.title}"
    points = records.series("train/loss")
    if not points:  # devices that train alone tell their loss once a round
        points = records.series("round/train_loss")
        line = Line(xs=[along.of(p) for p in points], ys=values(points), key=Key("", PALETTE[0]))
        return line_chart(title, [line], scale=scale, note="means of whole rounds")
    window = len(points) // 80 * 2 + 1  # odd: as many before as after
    xs = [along.of(p) for p in points]
    smooth = derived.running_mean(values(points), window=window)
    each = Line(xs=xs, ys=values(points), key=Key("each step", PALETTE[0], "dotted"), kind="dots")
    mean = Line(xs=xs, ys=list(smooth), key=Key(f"mean of {window} steps", PALETTE[0]))
    return line_chart(title, [each, mean] if window > 1 else [mean], scale=scale)


def _spans(numbers: Sequence[float], *, times: float) -> bool:
    """Return whether the largest is more than so many times the smallest."""
    known = [number for number in numbers if np.isfinite(number)]
    return bool(known) and min(known) > 0 and max(known) > times * min(known)


# --- pace -------------------------------------------------------------------------------------


def pace(records: RunRecords) -> Section:
    """Return seconds a step against what the plans predicted, and seconds a round."""
    whole = records.series("round/seconds")
    kind: Literal["bars", "steps"] = "bars" if len(whole) <= 60 else "steps"
    bars = Line(xs=rounds(whole), ys=values(whole), key=Key("", PALETTE[0]), kind=kind)
    scale = Scale(x="round", y="seconds", from_zero=True)
    note = "with evaluation and hand-back"
    return Section(
        title="Pace",
        text=_pace_in_words(records),
        charts=drawn(
            _step_seconds(records), line_chart("Seconds a round", [bars], scale=scale, note=note)
        ),
    )


def _step_seconds(records: RunRecords) -> Chart | None:
    each, medians = derived.step_durations(records), derived.step_medians(records)
    if not medians:  # a prediction alone is no chart
        return None
    log = _spans([*values(each), *values(medians)], times=30)
    lines = [
        Line(
            xs=steps(each), ys=values(each), key=Key("each step", PALETTE[0], "dotted"), kind="dots"
        ),
        Line(xs=steps(medians), ys=values(medians), key=Key("median of a round", PALETTE[0])),
        _predicted(records),
    ]
    scale = Scale(x="optimizer steps", y="seconds", from_zero=True, log=log)
    return line_chart("Seconds a step", lines, scale=scale)


def _predicted(records: RunRecords) -> Line:
    plans = records.plans
    known = [np.nan if plan.predicted_step_s is None else plan.predicted_step_s for plan in plans]
    xs = [float(plan.step) for plan in plans]
    if plans:  # the last one still holds
        xs, known = [*xs, float(max(records.last_step, plans[-1].step + 1))], [*known, known[-1]]
    return Line(xs=xs, ys=known, key=Key("predicted by the plan", MUTED, "dashed"), kind="steps")


def _pace_in_words(records: RunRecords) -> str:
    medians = derived.step_medians(records)
    predicted = records.plans[-1].predicted_step_s if records.plans else None
    since = records.plans[-1].step if records.plans else 0
    measured = [point.value for point in medians if point.step > since]
    if not measured:
        return ""
    words = f"A step took {seconds(statistics.median(measured))}"
    if predicted is None:
        return words + "."
    share = (statistics.median(measured) / predicted - 1) * 100 if predicted > 0 else 0.0
    return f"{words} under the latest plan, which predicted {seconds(predicted)} ({share:+.0f} %)."


# --- traffic and aggregation ------------------------------------------------------------------


def traffic(records: RunRecords) -> Section:
    """Return bytes over the broker, in all and by round."""
    ways = {UP: records.series("traffic/bytes_up"), DOWN: records.series("traffic/bytes_down")}
    total = [Line(xs=steps(p), ys=values(p), key=key) for key, p in ways.items()]
    by_round = [_bytes_by_round(points, key) for key, points in ways.items()]
    log = _spans([y for line in by_round for y in line.ys], times=30)
    scale = Scale(x="round", y="bytes", log=log, from_zero=True)
    return Section(
        title="Traffic",
        text="Payload over the broker: up from the devices, down to them.",
        charts=drawn(
            line_chart(
                "Bytes in all", total, scale=Scale(x="optimizer steps", y="bytes", from_zero=True)
            ),
            line_chart(
                "Bytes by round",
                by_round,
                scale=scale,
                note="The first has the weights that the devices fetched.",
            ),
        ),
    )


def _bytes_by_round(points: Sequence[Point], key: Key) -> Line:
    ends = {point.round: point.value for point in points}
    counts = np.diff([0.0, *ends.values()])
    return Line(xs=[float(round_) for round_ in ends], ys=list(counts), key=key)


def aggregation(records: RunRecords) -> Section:
    """Return norm, rank and relative error of the global update after each round."""
    return Section(
        title="Aggregation",
        text=(
            "The global update, kept factored: its size, its rank, and how far what devices are "
            "handed is from the exact sum. In an exact strategy that is rounding."
        ),
        charts=drawn(
            _by_round(records, "aggregation/norm", "Norm of the update", "Frobenius norm"),
            _by_round(records, "aggregation/largest_rank", "Largest rank of a module", "rank"),
            _relative_error(records),
        ),
    )


def _by_round(records: RunRecords, name: str, title: str, unit: str) -> Chart | None:
    points = records.series(name)
    line = Line(xs=rounds(points), ys=values(points), key=Key("", PALETTE[0]))
    return line_chart(title, [line], scale=Scale(x="round", y=unit, from_zero=True))


def _relative_error(records: RunRecords) -> Chart | None:
    lines = [
        Line(xs=rounds(points), ys=[v if v > 0 else np.nan for v in values(points)], key=key)
        for name, key in (
            ("aggregation/error", Key("all modules", INK)),
            ("aggregation/relative_error", Key("the worst module", PALETTE[0])),
        )
        for points in [records.series(name)]
    ]
    scale = Scale(x="round", y="relative error", log=True)
    note = "Rounds without a point lost nothing."
    return line_chart("Error of the aggregation", lines, scale=scale, note=note)
