"""What a run measured: ``metrics.jsonl``, TensorBoard events and ``summary.json``.

A metric's name is its TensorBoard tag: ``train/loss``, ``eval/perplexity``,
``device/<id>/step_s``. Its step is the number of optimizer steps done when it was measured,
so the evaluation before training stands at step 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator import json_lines
from shared.atomic import replace_file
from shared.clock import Clock
from shared.program import uninterrupted
from shared.protocol.messages import DeviceId

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


class MetricsWriter:
    """Appends measurements to a run's folder. Belongs to the owner's thread."""

    def __init__(
        self, run_folder: Path, clock: Clock, *, tensorboard: bool, resumed_step: int | None = None
    ) -> None:
        """Open the files of ``run_folder``.

        ``resumed_step``: the run goes on from a checkpoint after this many steps. What was
        measured later is dropped, for it will be measured again. None begins anew.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._clock = clock
        self._folder = run_folder
        self._file = json_lines.opened(run_folder / METRICS_FILE, resumed_step=resumed_step)
        self._events = _open_events(run_folder, resumed_step) if tensorboard else None

    def write(self, values: Mapping[str, float], *, round_: int, step: int) -> None:
        """Append one line, with all ``values`` measured after ``step`` steps, and flush it.

        A value that is not finite becomes null: JSON has no NaN.

        Raises:
            StorageError: the disk is full.
        """
        head = json_lines.head(self._clock, round_=round_, step=step)
        json_lines.append(self._file, head | dict(values))
        if self._events is not None:
            with uninterrupted():  # they go to a thread of TensorBoard's, through a queue
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Drop what was measured after ``step`` steps: a round is repeated.

        Raises:
            StorageError: the folder cannot be written.
        """
        self.close()
        self._file = json_lines.opened(self._folder / METRICS_FILE, resumed_step=step)
        if self._events is not None:
            self._events = _open_events(self._folder, step)

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _open_events(run_folder: Path, resumed_step: int | None) -> SummaryWriter:
    # It takes a second to import, and not every run writes events.
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    purge = None if resumed_step is None else resumed_step + 1
    return SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSummary:
    """What one device did: its last plan, and the tokens it predicted in training."""

    split_layer: int
    ranks: Mapping[str, int]
    target_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run did: the contents of ``summary.json``.

    Perplexities are of the held-out text of all devices, and where the run classifies the scores
    of `coordinator.scores` take their place; None where there is none. Bytes are payload over the
    broker, ``up`` from the devices, ``down`` to them.
    """

    perplexity_before: float | None
    perplexity_after: float | None
    steps: int
    seconds: float
    bytes_up: int
    bytes_down: int
    devices: Mapping[DeviceId, DeviceSummary]
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    f1_before: float | None = None
    f1_after: float | None = None

    def save(self, run_folder: Path) -> Path:
        """Write ``summary.json`` whole or not at all, and return its path.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        path = run_folder / SUMMARY_FILE
        scores = ("accuracy_before", "accuracy_after", "f1_before", "f1_after")
        found = asdict(self)
        # A run that writes text has none of these at all.
        written = {n: value for n, value in found.items() if n not in scores or value is not None}
        replace_file(path, json.dumps(written, indent=2).encode() + b"\n")
        return path
