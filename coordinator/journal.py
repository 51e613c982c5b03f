"""What a run decided, and why: ``plans.jsonl``, ``importance.jsonl`` and ``importance.json``.

Each line holds the round and the number of optimizer steps that were done when it was written,
as in ``metrics.jsonl``: the plan before training stands at step 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator import json_lines
from shared.atomic import replace_file
from shared.clock import Clock

PLANS_FILE = "plans.jsonl"
IMPORTANCE_FILE = "importance.jsonl"
LATEST_IMPORTANCE_FILE = "importance.json"


class Journal:
    """Appends plans and importance to a run's folder. Belongs to the owner's thread."""

    def __init__(self, run_folder: Path, clock: Clock, resumed_step: int | None = None) -> None:
        """Open the files of ``run_folder``.

        ``resumed_step``: the run goes on from a checkpoint after this many steps; what was
        written later is dropped. None begins anew.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._clock = clock
        self._latest = run_folder / LATEST_IMPORTANCE_FILE
        importance = run_folder / IMPORTANCE_FILE
        self._plans = json_lines.opened(run_folder / PLANS_FILE, resumed_step=resumed_step)
        self._importance = json_lines.opened(importance, resumed_step=resumed_step)
        kept = json_lines.records(importance)
        if kept:
            self._publish(kept[-1])
        else:
            self._latest.unlink(missing_ok=True)

    def plan(
        self,
        round_: int,
        step: int,
        *,
        predicted_step_s: float | None,
        devices: Mapping[str, Mapping[str, Any]],
        refused: Mapping[str, str],
        server_ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Append the plan that holds from round ``round_`` on, after ``step`` steps.

        ``devices``: what each trains: ``split_layer``, ``batch``, ``micro_batch``, ``in_flight``,
        ``ranks`` (module path → rank), ``reason`` for people, ``predicted_step_s`` or None.
        ``refused``: why a device has no part in it. ``server_ranks``: of the blocks that the
        server holds a copy of. A number that is not finite becomes null.

        Raises:
            StorageError: the disk is full.
        """
        plan = {
            "predicted_step_s": predicted_step_s,
            "devices": devices,
            "refused": refused,
            "server_ranks": server_ranks or {},
        }
        head = json_lines.head(self._clock, round_=round_, step=step)
        json_lines.append(self._plans, head | plan)

    def importance(self, round_: int, step: int, scores: Mapping[str, float]) -> None:
        """Append the importance of each module (by its path), and publish it as the latest.

        Raises:
            StorageError: the disk is full.
        """
        record = json_lines.head(self._clock, round_=round_, step=step) | {"scores": scores}
        json_lines.append(self._importance, record)
        self._publish(record)

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._plans.close()
        self._importance.close()

    def _publish(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(json_lines.jsonable(record), indent=2, allow_nan=False)
        replace_file(self._latest, text.encode() + b"\n")
