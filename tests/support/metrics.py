"""What a run measured, read back."""

from __future__ import annotations

import json
from pathlib import Path

from coordinator.metrics import METRICS_FILE


def read_metrics(run_folder: Path) -> list[dict[str, float | None]]:
    """Return every line of a run's ``metrics.jsonl``, oldest first."""
    text = (run_folder / METRICS_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]
