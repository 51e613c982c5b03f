"""What is known of a run that is to be shown: its measurements, plans, importance, outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

if TYPE_CHECKING:
    from coordinator.metrics import Summary

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Step: TypeAlias = Annotated[int, Field(ge=0, lt=2**53)]
"""What a float can hold exactly, for it becomes a coordinate."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measured value; NaN where it was measured and is not finite."""

    time_s: float
    round: int
    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDevice:
    """One device in a plan; ``ranks`` by module path."""

    split_layer: Step | None = None
    batch: Step | None = None
    micro_batch: Step | None = None
    in_flight: Step | None = None
    ranks: Mapping[str, Step] = field(default_factory=dict)
    reason: str | None = None
    predicted_step_s: Finite | None = None

    @property
    def mean_rank(self) -> float | None:
        """Mean of the ranks; None where no module is adapted."""
        return sum(self.ranks.values()) / len(self.ranks) if self.ranks else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One line of ``plans.jsonl``."""

    time: Finite
    round: Step
    step: Step
    predicted_step_s: Finite | None = None
    devices: Mapping[str, PlannedDevice] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    server_ranks: Mapping[str, Step] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """One line of ``importance.jsonl``; ``scores`` by module path."""

    time: Finite
    round: Step
    step: Step
    scores: Mapping[str, Finite | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """All that is known of a run. ``summary`` is None while it goes on, or where it failed."""

    folder_name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Sequence[Point]]
    plans: Sequence[Plan]
    importance: Sequence[Importance]
    summary: Summary | None

    @property
    def name(self) -> str:
        """The run's id."""
        return str(self.setting("run", "id") or self.folder_name)

    def setting(self, section: str, key: str) -> Any:
        """Return one setting of ``run.yaml``, or None."""
        found = self.settings.get(section)
        return found.get(key) if isinstance(found, dict) else None

    def series(self, name: str) -> Sequence[Point]:
        """Return all that was measured under a name, oldest first."""
        return self.metrics.get(name, ())

    def of_devices(self, what: str) -> dict[str, Sequence[Point]]:
        """Return ``device/<id>/<what>`` by device, where it was measured, in order of names."""
        return {
            device: points
            for name, points in sorted(self.metrics.items())
            for device, measured in _of_device(name)
            if measured == what
        }

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device that ever had a part, in order of names."""
        names = {device for name in self.metrics for device, _ in _of_device(name)}
        names.update(*(plan.devices for plan in self.plans))
        return tuple(sorted(names | set(self.summary.devices if self.summary else ())))

    @property
    def last_step(self) -> int:
        """Optimizer steps that were done when the last line was written."""
        return max((points[-1].step for points in self.metrics.values()), default=0)


def _of_device(name: str) -> list[tuple[str, str]]:
    """Return device and measure of the metric ``device/<id>/<measure>``; of others nothing."""
    prefix = "device/"
    device, _, measured = name[len(prefix) :].rpartition("/")
    return [(device, measured)] if name.startswith(prefix) and device else []
