"""What the page shows of the devices: what each was told to do and why, and how it fared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coordinator.report import derived, wording
from coordinator.report.charts import GRID, PALETTE, Bars, Chart, Grid, Key, Line, Scale
from coordinator.report.drawing import grid_chart, line_chart, timeline_chart
from coordinator.report.page import Row, Section, Table
from coordinator.report.records import Plan, PlannedDevice, Point, RunRecords
from coordinator.report.sections import drawn, values

SHOWN = 40
"""Devices that have a row, a line and a colour; a page of thousands helps nobody."""

_SERVER = "(server)"  # no device's name: these have no parentheses
_MOST_PLANS = 60
_MOST_BARS = 24
_MOST_REFUSED = 40
_COLUMNS = (
    *("device", "split\nlayer", "sequences\na step", "LoRA rank"),
    *("step\npredicted", "step\nmeasured", "target\ntokens"),
)
_COMPUTING = Key("computing", PALETTE[0])
_WAITING = Key("waiting within a step", PALETTE[1])
_BETWEEN = Key("hand-back, evaluation, waiting for others", GRID)

_TELEMETRY = (
    ("temperature_c", "Temperature", "°C"),
    ("accelerator_load_percent", "Accelerator load", "%"),
    ("cpu_load_percent", "CPU load", "%"),
    ("power_w", "Power", "W"),
    ("free_memory_bytes", "Free memory", "bytes"),
)


def shown(records: RunRecords) -> tuple[str, ...]:
    """Return the devices that the page shows: those in the latest plan first."""
    planned = records.plans[-1].devices if records.plans else ()
    return tuple(sorted(records.devices, key=lambda name: (name not in planned, name))[:SHOWN])


def _tables(records: RunRecords, names: Sequence[str]) -> list[Table]:
    """Return what each device does by the latest plan that has it, and who was refused."""
    latest = {name: one for plan in records.plans for name, one in plan.devices.items()}
    measured = _measured_step_s(records)
    rows = [_row(records, name, latest.get(name), measured_s=measured.get(name)) for name in names]
    left_out = len(records.devices) - len(names)
    note = f"{left_out} more devices are not shown." if left_out else ""
    tables = [Table(columns=_COLUMNS, rows=rows, note=note)]
    refused = sorted(records.plans[-1].refused.items()) if records.plans else []
    reasons = [Row((name,), why) for name, why in refused[:_MOST_REFUSED]]
    tables.append(Table(columns=("refused",), rows=reasons))
    return [table for table in tables if table.rows]


def _row(
    records: RunRecords, name: str, planned: PlannedDevice | None, *, measured_s: float | None
) -> Row:
    summary = records.summary.devices if records.summary else {}
    done = next((one for known, one in summary.items() if known == name), None)
    planned = planned or PlannedDevice(
        split_layer=done.split_layer if done else None, ranks=done.ranks if done else {}
    )
    cells = (
        name,
        wording.number(planned.split_layer),
        _batch_in_words(planned),
        wording.ranks(planned.ranks.values()),
        wording.seconds(planned.predicted_step_s),
        wording.seconds(measured_s),
        wording.number(done.target_tokens if done else _tokens(records, name)),
    )
    return Row(cells, planned.reason or "")


def _batch_in_words(planned: PlannedDevice) -> str:
    if planned.batch is None:
        return "–"
    if planned.micro_batch is None or planned.micro_batch >= planned.batch:
        return str(planned.batch)
    return f"{planned.batch} ({planned.micro_batch} at a time)"


def _tokens(records: RunRecords, device: str) -> float | None:
    counts = records.of_devices("target_tokens").get(device)
    return sum(values(counts)) if counts else None


def _measured_step_s(records: RunRecords) -> dict[str, float]:
    """Return what a step took each device in its last round."""
    count = records.setting("rounds", "steps")
    if not isinstance(count, int) or count < 1:
        return {}
    return {name: points[-1].value / count for name, points in records.of_devices("busy_s").items()}


# --- plans ------------------------------------------------------------------------------------


def plans(records: RunRecords, keys: Mapping[str, Key]) -> Section:
    """Return what each device does and why, and what the plans changed over time."""
    different = derived.differing(records.plans)
    kept = different[-_MOST_PLANS:]
    names = [name for name in keys if any(name in plan.devices for plan in kept)]
    grids: Sequence[tuple[str, Callable[[PlannedDevice], float | None]]] = (
        ("Split layer", lambda one: one.split_layer),
        ("Sequences a step", lambda one: one.batch),
        ("Mean rank", lambda one: one.mean_rank),
    )
    charts = [_plan_grid(title, kept, names, of=of) for title, of in grids]
    words = f"The last {_MOST_PLANS} of {len(different)} plans." if kept != different else ""
    return Section(
        title="Plans", charts=drawn(*charts), text=words, tables=_tables(records, list(keys))
    )


def _plan_grid(
    title: str,
    kept: Sequence[Plan],
    names: Sequence[str],
    *,
    of: Callable[[PlannedDevice], float | None],
) -> Chart | None:
    values_RC = np.full((len(names), len(kept)), np.nan)
    for column, plan in enumerate(kept):
        for row, name in enumerate(names):
            value = of(plan.devices[name]) if name in plan.devices else None
            values_RC[row, column] = np.nan if value is None else value
    columns = [str(plan.round) for plan in kept]
    return grid_chart(
        title, Grid(rows=names, columns=columns, values_RC=values_RC, x="planned for round")
    )


# --- how they fared ---------------------------------------------------------------------------


def timeline(records: RunRecords, keys: Mapping[str, Key]) -> Section:
    """Return what each device did when, and what its sensors said."""
    telemetry = [_telemetry(records, keys, *one) for one in _TELEMETRY]
    return Section(
        title="Devices over time",
        charts=drawn(_timeline(records, list(keys)), *telemetry),
        keys=tuple(keys.values()) if any(telemetry) else (),
    )


def _timeline(records: RunRecords, names: Sequence[str]) -> Chart | None:
    busy, computing = records.of_devices("busy_s"), records.of_devices("compute_s")
    shown_busy = {name: busy[name] for name in names if name in busy}
    rows = {_SERVER: records.series("round/server_busy_s"), **shown_busy}
    rows = {name: points for name, points in rows.items() if points}
    together = math.ceil(max(map(len, rows.values()), default=0) / _MOST_BARS)
    bars = [
        bar
        for row, (name, points) in enumerate(rows.items())
        for bar in _bars(records, row, points, computing.get(name, ()), together=together)
    ]
    known = any(point.value > 0 for points in computing.values() for point in points)
    return timeline_chart(
        "Who did what",
        list(rows),
        bars,
        x=derived.time_axis(records).label,
        keys=(_COMPUTING, _WAITING, _BETWEEN) if known else (_COMPUTING, _BETWEEN),
        note=f"{together} rounds in each bar" if together > 1 else "each bar a round",
    )


def _bars(
    records: RunRecords,
    row: int,
    busy: Sequence[Point],
    computing: Sequence[Point],
    *,
    together: int,
) -> list[Bars]:
    """Return one row's rounds, ``together`` in each bar: how long each part took, not when.

    Where nobody measured how much of the steps was computing, all of it counts as such.
    """
    time = derived.time_axis(records)
    lengths = derived.by_round(records.series("round/seconds"))
    computed = {round_: s for round_, s in derived.by_round(computing).items() if s > 0}
    spans: dict[Key, list[tuple[float, float]]] = {_BETWEEN: [], _WAITING: [], _COMPUTING: []}
    known = [point for point in busy if math.isfinite(point.value)]
    for some in (known[i : i + together] for i in range(0, len(known), together)):
        whole = [max(lengths.get(point.round, 0.0), point.value) for point in some]
        computing_s = [min(computed.get(point.round, math.inf), point.value) for point in some]
        start = time.of(some[0].time_s - whole[0])
        parts = (whole, [point.value for point in some], computing_s)
        for one, seconds in zip(spans.values(), parts, strict=True):
            one.append((start, sum(seconds) / time.unit_s))
    return [Bars(row=row, spans=one, colour=key.colour) for key, one in spans.items()]


def _telemetry(
    records: RunRecords, keys: Mapping[str, Key], name: str, title: str, unit: str
) -> Chart | None:
    time = derived.time_axis(records)
    lines = [
        Line(
            xs=[time.of(point.time_s) for point in points],
            ys=values(points),
            key=keys[device],
            in_legend=False,
        )
        for device, points in records.of_devices(name).items()
        if device in keys
    ]
    return line_chart(title, lines, scale=Scale(x=time.label, y=unit, whole_x=False))
