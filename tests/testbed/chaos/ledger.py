"""What a run accepted, by its own books: who, with what, in which step of which round.

Read from the tables of ``state.sqlite`` (`coordinator.state.statements`), as any tool may.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.planning.device_plan import DevicePlan

ROUNDS = """
SELECT * FROM rounds WHERE state = 'closed' AND end_step > first_step ORDER BY round
"""
PARTICIPANTS = """
SELECT * FROM participants JOIN plans USING (plan)
WHERE round = :round AND attempt = :attempt ORDER BY device
"""
CONTRIBUTIONS = """
SELECT step, target_tokens FROM contributions
WHERE round = :round AND attempt = :attempt AND device = :device
"""
ATTEMPTS = "SELECT round, attempt, state FROM rounds ORDER BY round, attempt"


@dataclass(frozen=True)
class Share:
    """What one device had in a round.

    ``position``: of its first sequence. ``tokens``: by step that it contributed to, from 0.
    ``outcome``: ``delivered`` if its adapters count, and not only its gradients on the server.
    """

    plan: DevicePlan
    position: int
    tokens: Mapping[int, int]
    outcome: str

    @property
    def delivered(self) -> bool:
        return self.outcome == "delivered"


@dataclass(frozen=True)
class AcceptedRound:
    """One round of the outcome; ``attempt`` from 1, ``shares`` by device."""

    number: int
    attempt: int
    first_step: int
    end_step: int
    shares: Mapping[str, Share]


def accepted_rounds(database: Path) -> Sequence[AcceptedRound]:
    """Return the rounds that are in the outcome of a run that has ended."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.row_factory = sqlite3.Row
        return [_round(db, row) for row in db.execute(ROUNDS).fetchall()]


def repeated_rounds(database: Path) -> int:
    """Return how many attempts at a round came to nothing."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return sum(state == "void" for _, _, state in db.execute(ATTEMPTS))


def _round(db: sqlite3.Connection, row: sqlite3.Row) -> AcceptedRound:
    key = {"round": row["round"], "attempt": row["attempt"]}
    participants = db.execute(PARTICIPANTS, key).fetchall()
    return AcceptedRound(
        row["round"],
        row["attempt"],
        row["first_step"],
        row["end_step"],
        {one["device"]: _share(db, key, one) for one in participants},
    )


def _share(db: sqlite3.Connection, key: Mapping[str, int], row: sqlite3.Row) -> Share:
    steps = db.execute(CONTRIBUTIONS, {**key, "device": row["device"]}).fetchall()
    plan = DevicePlan(
        split_layer=row["split_layer"],
        ranks=json.loads(row["ranks"]),
        scalings=json.loads(row["scalings"]),
        batch=row["batch"],
        micro_batch=row["micro_batch"],
        in_flight=row["in_flight"],
    )
    tokens = {one["step"]: one["target_tokens"] for one in steps}
    return Share(plan, row["first_sequence"], tokens, row["outcome"])
