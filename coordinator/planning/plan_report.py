"""A fleet's plan as a table for people, and as data for programs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from coordinator.planning.device_plan import DevicePlan, ranks_in_short
from coordinator.planning.planner import FleetPlan
from coordinator.planning.prediction import DevicePrediction

LEAST_S = 1e-6
"""Less is what a link takes that nobody measured."""

HEADINGS = (
    *("device", "k", "rank", "batch", "micro-batch", "in flight"),
    *("memory", "computes", "uplink", "downlink", "server", "its step", "why"),
)


def as_table(plan: FleetPlan) -> str:
    """Return every device's part, what it is predicted to cost, and why it is this one."""
    rows = [
        (device, *_part(own), *_costs(plan.prediction.devices.get(device)), str(reason))
        for device, own in sorted(plan.plans.items())
        for reason in [plan.reasons[device]]
    ]
    lines = _aligned([HEADINGS, *rows])
    lines += ["", _summary(plan)]
    lines += [f"refused: {reason}" for _, reason in sorted(plan.refused.items())]
    return "\n".join(lines)


def as_data(plan: FleetPlan) -> dict[str, Any]:
    """Return the same as JSON holds it; seconds and bytes."""
    return {
        "predicted_step_s": plan.predicted_step_s,
        "server_s": plan.prediction.server_s,
        "sequences": sum(own.batch for own in plan.plans.values()),
        "devices": {
            device: {
                "plan": _plan_data(own),
                "predicted": _or_none(plan.prediction.devices.get(device)),
                "reason": {**asdict(plan.reasons[device]), "text": str(plan.reasons[device])},
            }
            for device, own in sorted(plan.plans.items())
        },
        "refused": dict(sorted(plan.refused.items())),
    }


def _plan_data(plan: DevicePlan) -> dict[str, Any]:
    numbers = {name: getattr(plan, name) for name in ("split_layer", "batch", "micro_batch")}
    return {
        **numbers,
        "in_flight": plan.in_flight,
        "ranks": dict(plan.ranks),
        "scalings": dict(plan.scalings),
    }


def _or_none(predicted: DevicePrediction | None) -> Mapping[str, float] | None:
    return None if predicted is None else asdict(predicted)


def _part(plan: DevicePlan) -> tuple[str, ...]:
    return (
        str(plan.split_layer),
        ranks_in_short(plan.ranks),
        str(plan.batch),
        str(plan.micro_batch),
        str(plan.in_flight),
    )


def _costs(predicted: DevicePrediction | None) -> tuple[str, ...]:
    if predicted is None:
        return ("?",) * 6
    seconds = (
        predicted.compute_s,
        predicted.uplink_s,
        predicted.downlink_s,
        predicted.server_s,
        predicted.own_s,
    )
    return f"{predicted.memory_bytes / 2**20:.0f} MiB", *map(_seconds, seconds)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= LEAST_S else "0 s"


def _summary(plan: FleetPlan) -> str:
    sequences = sum(own.batch for own in plan.plans.values())
    busy = plan.prediction.server_s / max(plan.predicted_step_s, 1e-12)
    return (
        f"predicted: {plan.predicted_step_s:.3g} s a step of {sequences} sequences; the server is "
        f"busy for {plan.prediction.server_s:.3g} s of it ({busy:.0%})"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)),
                row[-1],
            ]
        )
        for row in rows
    ]
