"""Reads the files of a run folder, as far as they are there and whole.

A run may be at work, or have been killed at any moment: each file may be missing, old, or end in
the middle of a line. What cannot be read is left out, for a report of the rest is worth having.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from coordinator import json_lines
from coordinator.journal import IMPORTANCE_FILE, PLANS_FILE
from coordinator.metrics import METRICS_FILE, SUMMARY_FILE, Summary
from coordinator.report.records import Importance, Plan, Point, RunRecords
from coordinator.run_folder import RUN_FILE
from shared.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read(run_folder: Path) -> RunRecords:
    """Return what the files in ``run_folder`` say.

    Raises:
        ConfigError: the folder is no run's.
        StorageError: a file is there but cannot be read.
    """
    if not any((run_folder / name).exists() for name in (RUN_FILE, METRICS_FILE)):
        raise ConfigError(
            f"{run_folder} is no run folder: it has neither {RUN_FILE} nor {METRICS_FILE}"
        )
    records = RunRecords(
        folder_name=run_folder.resolve().name,
        settings=_settings(run_folder / RUN_FILE),
        metrics=_series(json_lines.records(run_folder / METRICS_FILE)),
        plans=_valid(Plan, run_folder / PLANS_FILE),
        importance=_valid(Importance, run_folder / IMPORTANCE_FILE),
        summary=None,
    )
    return _with_summary(records, run_folder / SUMMARY_FILE)


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        logger.warning("%s cannot be read, so the report lacks the settings: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    series: dict[str, list[Point]] = {}
    for line in lines:
        time_s = _number(line.get("time"))
        round_, step = (line.get(key) for key in ("round", "step"))
        if time_s is None or not isinstance(round_, int) or not isinstance(step, int):
            continue
        for name in line.keys() - {"time", "round", "step"}:
            value = math.nan if line[name] is None else _number(line[name])
            if value is not None:
                series.setdefault(name, []).append(Point(time_s, round_, step, value))
    return series


def _number(value: Any) -> float | None:
    """Return a finite number as it stands in a file, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else None


def _valid(kind: type[T], path: Path) -> list[T]:
    adapter = TypeAdapter(kind)
    found = []
    for record in json_lines.records(path):
        try:
            found.append(adapter.validate_python(record))
        except ValidationError as error:
            what = "; ".join(
                f"{problem['loc']}: {problem['msg']}" for problem in error.errors()[:3]
            )
            logger.warning(
                "the report leaves out a line of %s, which is no %s: %s", path, kind.__name__, what
            )
    return found


def _with_summary(records: RunRecords, path: Path) -> RunRecords:
    """Add the summary, unless the run went on after it was written."""
    try:
        summary = TypeAdapter(Summary).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return records
    return replace(records, summary=summary) if summary.steps >= records.last_step else records
