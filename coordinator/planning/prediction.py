"""How long a step takes under given plans, where its time goes, and what memory it needs. Pure.

Shape suffix: F measured devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.cost_book import CostBook, longest_shape
from coordinator.planning.cost_model import Cut, Stages, added, contended_s, stages
from coordinator.planning.device_plan import DevicePlan
from coordinator.planning.step_simulation import Exchange, SimulatedDevice, step_seconds
from shared.architecture import ModelArchitecture
from shared.protocol.messages import DeviceId

Planned: TypeAlias = tuple[FleetDevice, DevicePlan]

MOST_SIMULATED = 2000
"""Micro-batches in a step up to which the fleet is simulated; beyond that, `contended_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePrediction:
    """One device's step. ``own_s``: if nobody else were there; the others are parts of it.

    ``compute_s``: what the device computes in it, its optimizer included. ``memory_bytes``: at
    the longest sequences, and with the largest `residual`.
    """

    own_s: float
    compute_s: float
    uplink_s: float
    downlink_s: float
    server_s: float
    memory_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The fleet's step. ``server_s``: the server's work in it. ``devices``: those measured."""

    step_s: float
    server_s: float
    devices: Mapping[DeviceId, DevicePrediction]


def predict(
    plans: Mapping[DeviceId, DevicePlan], devices: Sequence[FleetDevice], conditions: Conditions
) -> Prediction:
    """Return what a step takes if every device of ``devices`` that has a plan follows it.

    Of a device without measurements only its load on the server is known.
    """
    book = CostBook(devices, conditions)
    steps = _steps(plans, devices, book, conditions)
    first_block = min(
        (step.plan.split_layer for step in steps if not step.is_alone),
        default=conditions.architecture.block_count,
    )
    optimizer_s = book.server.optimizer_s(first_block)
    found = {step.device: step.prediction for step in steps if step.prediction is not None}
    server_s = optimizer_s + sum(step.server_s for step in steps)
    return Prediction(
        step_s=_step_s(steps, server_s, optimizer_s, conditions), server_s=server_s, devices=found
    )


def simulated_fleet(
    plans: Mapping[DeviceId, DevicePlan], devices: Sequence[FleetDevice], conditions: Conditions
) -> list[SimulatedDevice]:
    """Return the steps of the devices that have a plan, for `step_simulation`."""
    steps = _steps(plans, devices, CostBook(devices, conditions), conditions)
    return [step.simulated() for step in steps]


def simulated(
    staged: Stages, micro_batches: int, *, in_flight: int, is_alone: bool
) -> SimulatedDevice:
    """Return a device's step for `step_simulation`."""
    exchanges = tuple(
        Exchange(up=float(up), server=float(server), down=float(down))
        for up, server, down in zip(staged.up, staged.server, staged.down, strict=True)
    )
    return SimulatedDevice(
        micro_batches=micro_batches,
        in_flight=in_flight,
        compute=tuple(float(seconds) for seconds in staged.compute),
        exchanges=() if is_alone else exchanges,
        latency_s=float(staged.latency_s),
        optimizer_s=float(staged.optimizer_s),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One device's step: row ``row`` of ``staged``, the stages of micro-batches of mean size."""

    device: DeviceId
    plan: DevicePlan
    staged: Stages
    row: int
    is_alone: bool
    server_s: float
    prediction: DevicePrediction | None = None

    def simulated(self) -> SimulatedDevice:
        return simulated(
            self.staged.of_row(self.row),
            micro_batches_of(self.plan),
            in_flight=self.plan.in_flight,
            is_alone=self.is_alone,
        )


def micro_batches_of(plan: DevicePlan) -> int:
    """Return how many micro-batches a step of this plan has."""
    return -(-plan.batch // plan.micro_batch)


def _steps(
    plans: Mapping[DeviceId, DevicePlan],
    devices: Sequence[FleetDevice],
    book: CostBook,
    conditions: Conditions,
) -> list[_Step]:
    planned = [(one, plans[one.device_id]) for one in devices if one.device_id in plans]
    measured = [pair for pair in planned if pair[0].measurements is not None]
    unknown = [pair for pair in planned if pair[0].measurements is None]
    steps = _measured(measured, book, conditions.architecture) if measured else []
    return steps + [_unmeasured(*pair, book, conditions) for pair in unknown]


def _measured(
    planned: Sequence[Planned], book: CostBook, architecture: ModelArchitecture
) -> list[_Step]:
    costs = book.of_all([device for device, _ in planned], axes=0)
    cut = _cut(planned, book, architecture)
    batch_F = np.array([plan.batch for _, plan in planned])
    size_F = np.array([min(plan.micro_batch, plan.batch) for _, plan in planned])
    in_flight_F = np.array([plan.in_flight for _, plan in planned])
    count_F = -(-batch_F // size_F)
    staged = stages(costs, book.server, cut, batch_F / count_F)
    columns = (
        staged.step_s(count_F, in_flight_F),
        count_F * added(staged.compute) + staged.optimizer_s,
        count_F * added(staged.up),
        count_F * added(staged.down),
        count_F * added(staged.server),
        costs.memory_bytes(cut, size_F, at_once=np.minimum(in_flight_F, count_F)),
    )
    rows = np.stack([np.broadcast_to(column, count_F.shape) for column in columns], axis=1)
    alone_F = costs.is_alone(cut.split_layer)
    return [
        _Step(
            device=device.device_id,
            plan=plan,
            staged=staged,
            row=row,
            is_alone=bool(alone_F[row]),
            server_s=numbers[4],
            prediction=DevicePrediction(**dict(zip(_COLUMNS, numbers, strict=True))),
        )
        for row, ((device, plan), numbers) in enumerate(zip(planned, rows.tolist(), strict=True))
    ]


_COLUMNS = ("own_s", "compute_s", "uplink_s", "downlink_s", "server_s", "memory_bytes")


def _cut(planned: Sequence[Planned], book: CostBook, architecture: ModelArchitecture) -> Cut:
    """Return every device's own cut, with the adapters that its ranks make."""
    split_layer_F = np.array([plan.split_layer for _, plan in planned])
    known: dict[int, int] = {}  # of one object: plans of a large fleet share their ranks
    for _, plan in planned:
        if id(plan.ranks) not in known:
            known[id(plan.ranks)] = sum(
                rank * sum(architecture.features(name)) for name, rank in plan.ranks.items()
            )
    residual = [float(book.cut(one, plan.split_layer).residual_bytes) for one, plan in planned]
    return Cut(
        split_layer=split_layer_F,
        parameters=np.array([float(known[id(plan.ranks)]) for _, plan in planned]),
        back_parameters=book.server.parameters[split_layer_F],
        residual_bytes=np.array(residual),
    )


def _unmeasured(
    device: FleetDevice, plan: DevicePlan, book: CostBook, conditions: Conditions
) -> _Step:
    """Return the step of a device of which only the server's part is known."""
    shape = device.data or longest_shape(conditions.training)
    count, head = micro_batches_of(plan), conditions.training.labels == "device"
    sequences, cut = plan.batch / count, book.cut(device, plan.split_layer)
    is_alone = head and plan.split_layer == book.server.block_count
    there, back = (
        0.0 if is_alone else float(seconds(cut, sequences * shape.padded_length))
        for seconds in (book.server.forward_s, book.server.backward_s)
    )
    at_head = 0.0 if head else float(book.server.head_s(sequences * shape.mean_length))
    server = (there, back) if head else (there + at_head + back,)
    nothing = (0.0,) * len(server)
    return _Step(
        device=device.device_id,
        plan=plan,
        staged=Stages(
            compute=(*nothing, 0.0),
            up=nothing,
            server=server,
            down=nothing,
            latency_s=0.0,
            optimizer_s=0.0,
        ),
        row=0,
        is_alone=is_alone,
        server_s=count * sum(server),
    )


def _step_s(
    steps: Sequence[_Step], server_s: float, optimizer_s: float, conditions: Conditions
) -> float:
    if sum(micro_batches_of(step.plan) for step in steps) <= MOST_SIMULATED:
        return step_seconds(
            [step.simulated() for step in steps],
            server_optimizer_s=optimizer_s,
            open_micro_batches=conditions.open_micro_batches,
        )
    longest_s = max((one.prediction.own_s for one in steps if one.prediction), default=0.0)
    return float(contended_s(longest_s, server_s, devices=len(steps)))
