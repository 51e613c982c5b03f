"""From what devices measured to what each does: split layer, batch, micro-batch and ranks. Pure.

First the cut: of all parts that fit into memory, those which make the fleet's step shortest for
the same number of sequences in all, distributed so that unequal devices finish together. Then
the ranks: as many adapter parameters as the terms say, where the weights matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from coordinator.planning.allocation import Load, best_choices
from coordinator.planning.assigned_ranks import RankBook
from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.cost_book import CostBook
from coordinator.planning.device_plan import DevicePlan
from coordinator.planning.estimate import plan_device
from coordinator.planning.options import Options
from coordinator.planning.plan_reasons import Reason, reason_of
from coordinator.planning.possible_parts import PossibleParts
from coordinator.planning.prediction import Prediction, predict, simulated_fleet
from coordinator.planning.server_room import ServerRoom, server_room
from shared.errors import PlanError
from shared.protocol.messages import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """A part for everybody but those ``refused``, who cannot take part (and why)."""

    plans: Mapping[DeviceId, DevicePlan]
    reasons: Mapping[DeviceId, Reason]
    refused: Mapping[DeviceId, str]
    prediction: Prediction

    @property
    def predicted_step_s(self) -> float:
        """How long a step of the fleet should take."""
        return self.prediction.step_s


def plan_fleet(
    devices: Sequence[FleetDevice],
    conditions: Conditions,
    *,
    importance: Mapping[str, float] = MappingProxyType({}),
) -> FleetPlan:
    """Return the parts that make the fleet's step shortest.

    A device that is pinned keeps its part. One without measurements gets what its settings
    state, or an estimate. All together take the sequences that their terms say, each at least 1.
    ``importance``: scores by full module path; may be empty.

    Raises:
        PlanError: nobody can take part (with the reasons), or the server has no room.
    """
    if not conditions.one_split_layer:
        return _plan(devices, conditions, importance)
    found: list[FleetPlan] = []
    error: PlanError | None = None
    for split_layer in _common_split_layers(devices, conditions):
        try:
            only = replace(conditions, only_split_layer=split_layer)
            found.append(_plan(devices, only, importance))
        except PlanError as why:
            error = error or why
    if not found:
        assert error is not None  # there is at least one split layer to try
        raise error
    return min(found, key=lambda plan: (len(plan.refused), plan.predicted_step_s))


def _common_split_layers(devices: Sequence[FleetDevice], conditions: Conditions) -> Sequence[int]:
    """Return what may be tried as everybody's split layer: what somebody has already, or any."""
    taken = {one.pinned.split_layer for one in devices if one.pinned is not None}
    taken |= {n for one in devices if (n := one.terms.split_layer) is not None}
    most = conditions.most_blocks or conditions.architecture.block_count
    return sorted(taken) or range(1, most + 1)


def _plan(
    devices: Sequence[FleetDevice], conditions: Conditions, importance: Mapping[str, float]
) -> FleetPlan:
    draft = _Draft(devices, conditions, RankBook(conditions, importance))
    draft.settle()
    draft.allocate()
    if not draft.plans:
        raise PlanError("no device can take part: " + "; ".join(draft.refused.values()))
    return FleetPlan(
        plans=draft.plans,
        reasons=draft.reasons,
        refused=draft.refused,
        prediction=predict(draft.plans, devices, conditions),
    )


class _Draft:
    """A fleet's plan in the making: first what is settled, then everybody else together."""

    def __init__(
        self, devices: Sequence[FleetDevice], conditions: Conditions, ranks: RankBook
    ) -> None:
        self.plans: dict[DeviceId, DevicePlan] = {}
        self.reasons: dict[DeviceId, Reason] = {}
        self.refused: dict[DeviceId, str] = {}
        self._devices = devices
        self._conditions = conditions
        self._ranks = ranks
        self._book = CostBook(devices, conditions)

    def settle(self) -> None:
        """Take pinned parts as they are; without measurements what is stated, or an estimate."""
        for device in self._devices:
            try:
                if device.pinned is not None:
                    self._take(device, device.pinned, kind="kept")
                elif device.measurements is None:
                    self._take_unmeasured(device)
            except PlanError as error:
                self.refused[device.device_id] = str(error)

    def allocate(self) -> None:
        """Give the others the parts with which the whole fleet's step is shortest."""
        settled = [one for one in self._devices if one.device_id in self.plans]
        others = [one for one in self._devices if self._is_open(one)]
        if not others:
            return
        room = server_room(self._devices, self._book.server, self._conditions)
        possible = PossibleParts(self._book, self._conditions, room)
        options = possible.of(others)
        self.refused.update(possible.refused)
        if not options:
            return
        wanted = sum(one.terms.batch for one in settled)
        wanted += sum(one.device.terms.batch for one in options)
        taken = sum(plan.batch for plan in self.plans.values())
        found = best_choices(
            options, wanted - taken, book=self._book, load=self._load(settled, room)
        )
        for one, (option, batch) in zip(options, found, strict=True):
            self._take_option(one, option, batch)

    def _is_open(self, device: FleetDevice) -> bool:
        return device.device_id not in self.plans and device.device_id not in self.refused

    def _load(self, settled: Sequence[FleetDevice], room: ServerRoom) -> Load:
        """Return what is there without the open devices.

        The server's optimizer counts as if it held every block that it may.
        """
        known = predict(self.plans, settled, self._conditions)
        return Load(
            devices=simulated_fleet(self.plans, settled, self._conditions),
            longest_s=max((one.own_s for one in known.devices.values()), default=0.0),
            server_s=known.server_s,
            server_optimizer_s=self._book.server.optimizer_s(room.least_split_layer),
            open_micro_batches=self._conditions.open_micro_batches,
        )

    def _take_unmeasured(self, device: FleetDevice) -> None:
        terms = device.terms
        if terms.split_layer is None and self._conditions.only_split_layer is not None:
            terms = replace(terms, split_layer=self._conditions.only_split_layer)
        plan = plan_device(
            device.device_id,
            terms,
            architecture=self._conditions.architecture,
            training=self._conditions.training,
            declared_limit_bytes=device.declared_limit_bytes,
        )
        stated = device.terms.split_layer is not None
        self._take(device, plan, kind="stated" if stated else "estimated")

    def _take(
        self, device: FleetDevice, plan: DevicePlan, *, kind: Literal["kept", "stated", "estimated"]
    ) -> None:
        self.plans[device.device_id] = plan
        self.reasons[device.device_id] = Reason(kind=kind, split_layer=plan.split_layer)

    def _take_option(self, options: Options, option: int, batch: int) -> None:
        device = options.device
        split_layer = int(options.split_layer_O[option])
        ranks, scalings = self._ranks.of(device.terms.lora, range(split_layer), share=options.share)
        micro_batch = min(int(options.micro_batch_O[option]), batch)
        if not device.terms.micro_batch_is_stated:  # as many, but of equal size
            micro_batch = -(-batch // -(-batch // micro_batch))
        self.plans[device.device_id] = DevicePlan(
            split_layer=split_layer,
            ranks=ranks,
            scalings=scalings,
            batch=batch,
            micro_batch=micro_batch,
            in_flight=int(options.in_flight_O[option]),
        )
        self.reasons[device.device_id] = reason_of(options, option, batch, book=self._book)
