"""What ``state.sqlite`` says of a run: for programs, and as tables for people.

Of a run that is at work, one that has ended, and one whose coordinator was killed. Only reads.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from coordinator.planning.device_plan import ranks_in_short
from coordinator.state import database, statements
from shared import health
from shared.clock import Clock
from shared.errors import UnhealthyError

MOST_AGE_S: Final = 120.0
"""Without progress for so long, a coordinator that has not ended counts as stuck or killed."""
_ROUND_HEADINGS = ("round", "attempt", "state", "steps", "opened (UTC)", "error", "devices, ending")
_DEVICE_HEADINGS = (
    *("device", "starts", "first seen (UTC)", "last seen (UTC)", "split", "ranks", "batch"),
    *("rounds", "target tokens", "outcome"),
)
_JSON_COLUMNS = ("profile", "measured", "ranks", "server_ranks")

Record = dict[str, Any]


def read(run_folder: Path, clock: Clock) -> Record:
    """Return all that is recorded of a run but the single steps, all of one moment.

    ``coordinator``: ``at work``, ``killed or stuck``, or how it ended, and ``phase`` where it is at
    work; ``starts`` of it; ``devices``, the latest session of each; ``rounds``, all attempts, with
    ``participants``, who have the figures of their plan, and ``steps``: in how many closed steps
    their gradients are.

    Raises:
        StorageError: there is no ``state.sqlite``, or it is damaged or of another program.
    """
    phase = _phase(run_folder, clock)
    with database.reading(run_folder / database.STATE_FILE) as db:
        starts = _records(db, statements.READ_STARTS)
        devices = _records(db, statements.READ_DEVICES)
        rounds = _records(db, statements.READ_ROUNDS)
        participants = _records(db, statements.READ_PARTICIPANTS)
    for one in rounds:
        key = (one["round"], one["attempt"])
        own = [p for p in participants if (p["round"], p["attempt"]) == key]
        one["participants"] = [_without(p, "round", "attempt", "plan") for p in own]
    return {
        "run_folder": str(run_folder),
        "coordinator": _coordinator(starts, phase),
        "phase": phase,
        "starts": starts,
        "devices": devices,
        "rounds": rounds,
    }


def as_table(found: Record) -> str:
    """Return what `read` gave as lines for people."""
    phase = "" if found["phase"] is None else f": {found['phase']}"
    restarts = len(found["starts"]) - 1
    again = f" (started again {restarts} times)" if restarts > 0 else ""
    lines = [f"{found['run_folder']}: coordinator {found['coordinator']}{phase}{again}", ""]
    lines += _aligned([_ROUND_HEADINGS, *(_round_row(one) for one in found["rounds"])])
    lines += ["", *_aligned([_DEVICE_HEADINGS, *_device_rows(found)])]
    return "\n".join(lines)


def _coordinator(starts: Sequence[Record], phase: str | None) -> str:
    if phase is not None:
        return "at work"
    ending = starts[-1]["ending"] if starts else None
    return "killed or stuck" if ending is None else f"not at work ({ending})"


def _phase(run_folder: Path, clock: Clock) -> str | None:
    """Return what the coordinator says that it does; None where there is none that makes progress.

    Asked before the database is: what has ended since has written so there.
    """
    try:
        path = run_folder / health.FILE_NAME
        return health.check(path, max_age_s=MOST_AGE_S, clock=clock).phase
    except UnhealthyError:
        return None


def _records(db: sqlite3.Connection, statement: str) -> list[Record]:
    rows = [dict(row) for row in db.execute(statement)]
    for row in rows:
        row |= {name: json.loads(row[name]) for name in _JSON_COLUMNS if row.get(name) is not None}
    return rows


def _without(record: Record, *names: str) -> Record:
    return {name: value for name, value in record.items() if name not in names}


def _round_row(one: Record) -> Sequence[str]:
    steps = one["end_step"] - one["first_step"]
    outcomes = Counter(p["outcome"] for p in one["participants"])
    devices = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    error = one["aggregation_error"]
    return (
        str(one["round"]),
        str(one["attempt"]),
        one["state"],
        f"{one['first_step']}-{one['end_step'] - 1}" if steps else "none",
        _moment(one["opened_at"]),
        "" if error is None else f"{error:.2g}",
        devices + (f" ({one['ending']})" if one["state"] == "void" else ""),
    )


def _device_rows(found: Record) -> Iterable[Sequence[str]]:
    for one in found["devices"]:
        counted = [p for p in _parts(found, one["device"], "closed") if p["target_tokens"]]
        latest = _latest_part(found, one["device"])
        reason = f" ({one['reason']})" if one["reason"] and one["outcome"] != "done" else ""
        yield (
            one["device"],
            str(one["sessions"]),
            _moment(one["first_seen_at"]),
            _moment(one["last_seen_at"]),
            *latest,
            str(len(counted)),
            f"{sum(p['target_tokens'] for p in counted):,}",
            one["outcome"] + reason,
        )


def _parts(found: Record, device: str, *states: str) -> list[Record]:
    return [
        part
        for one in found["rounds"]
        if one["state"] in states
        for part in one["participants"]
        if part["device"] == device
    ]


def _latest_part(found: Record, device: str) -> Sequence[str]:
    parts = _parts(found, device, "open", "closing", "closed") or _parts(found, device, "void")
    if not parts:
        return ("", "", "")
    ranks: Mapping[str, int] = parts[-1]["ranks"]
    return str(parts[-1]["split_layer"]), ranks_in_short(ranks), str(parts[-1]["batch"])


def _moment(time: str) -> str:
    return time[:19].replace("T", " ")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
