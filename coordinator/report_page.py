"""``report.html``: a run's curves, plans, traffic and devices in one file that needs no other."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path

from coordinator.report import (
    charts,
    derived,
    device_sections,
    drawing,
    page,
    reading,
    sections,
    wording,
)
from coordinator.report.importance_section import importance
from coordinator.report.records import RunRecords
from shared.atomic import replace_file

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_MADE_FROM = (
    "the files beside it: metrics.jsonl, plans.jsonl, importance.jsonl, summary.json, run.yaml"
)


def write(run_folder: Path, to: Path | None = None) -> Path:
    """Write the report of a run, finished or at work, and return its path.

    ``to``: the file to write; None for ``report.html`` in the run's folder.

    Raises:
        ConfigError: the folder is no run's.
        StorageError: a file cannot be read, or the report cannot be written.
    """
    path = to or run_folder / REPORT_FILE
    replace_file(path, render(reading.read(run_folder)).encode(), durable=False)
    return path


def write_if_possible(run_folder: Path) -> None:
    """Write the report at the end of a run, whose result does not depend on it."""
    try:
        logger.info("report: %s", write(run_folder))
    except Exception:  # whatever goes wrong in drawing, the run has succeeded
        logger.warning(
            "the report could not be made; the run itself is whole. Try again with "
            "`hsplit-coordinator report %s`",
            run_folder,
            exc_info=True,
        )


def render(run: RunRecords) -> str:
    """Return the page of a run as HTML."""
    keys = charts.device_keys(device_sections.shown(run))
    began_s, ended_s = _times(run)
    state = "finished" if run.summary else "not finished: as far as it was written"
    with drawing.style():
        parts = [
            sections.learning(run, keys),
            sections.pace(run),
            device_sections.plans(run, keys),
            device_sections.timeline(run, keys),
            sections.traffic(run),
            importance(run),
            sections.aggregation(run),
        ]
    return page.render(
        run.name,
        parts,
        subtitle=" · ".join(
            (_method(run), f"{wording.date(began_s)} to {wording.date(ended_s)}", state)
        ),
        headline=_headline(run),
        made_from=_MADE_FROM,
    )


def _method(run: RunRecords) -> str:
    strategy = run.settings.get("strategy")
    return f"{_model(run)} by {strategy}" if isinstance(strategy, str) else _model(run)


def _model(run: RunRecords) -> str:
    name = str(run.setting("model", "name") or "model not known")
    return Path(name).name if Path(name).is_absolute() else name


def _times(run: RunRecords) -> tuple[float | None, float | None]:
    times = [point.time_s for points in run.metrics.values() for point in (points[0], points[-1])]
    return min(times, default=None), max(times, default=None)


def _headline(run: RunRecords) -> list[tuple[str, str]]:
    """Return the figures that stand first, each with its name."""
    began_s, ended_s = _times(run)
    measure = derived.held_out_measure(run)
    held_out = [point.value for point in run.series(f"eval/{measure}")]
    medians = [point.value for point in derived.step_medians(run)]
    traffic = [run.series(f"traffic/bytes_{way}") for way in ("up", "down")]
    before, after = next(iter(held_out), None), next(reversed(held_out), None)
    if run.summary:
        before = getattr(run.summary, f"{measure}_before")
        after = getattr(run.summary, f"{measure}_after")
    elapsed_s = 0.0 if began_s is None or ended_s is None else ended_s - began_s
    up, down = (points[-1].value if points else None for points in traffic)
    if run.summary:
        up, down, elapsed_s = run.summary.bytes_up, run.summary.bytes_down, run.summary.seconds
    return [
        (f"held-out {measure}", f"{wording.number(before)} → {wording.number(after)}"),
        ("optimizer steps", _steps(run)),
        ("time", wording.seconds(elapsed_s)),
        ("seconds a step", wording.number(statistics.median(medians) if medians else None)),
        ("devices", str(len(run.devices))),
        ("sent by devices", wording.bytes_(up)),
        ("sent to devices", wording.bytes_(down)),
    ]


def _steps(run: RunRecords) -> str:
    parts = [run.setting("rounds", key) for key in ("count", "steps")]
    if not all(isinstance(part, int) for part in parts):
        return wording.number(run.last_step)
    return f"{wording.number(run.last_step)} of {wording.number(parts[0] * parts[1])}"
