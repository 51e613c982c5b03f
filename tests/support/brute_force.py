"""The best plan of a small fleet, by trying them all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.device_plan import DevicePlan
from coordinator.planning.prediction import predict
from shared.protocol.messages import DeviceId
from tests.support.fleets import part


def best_step_s(devices: Sequence[FleetDevice], conditions: Conditions) -> float:
    """Return the shortest predicted step over every plan that fits all devices' memory."""
    total = sum(one.terms.batch for one in devices)
    parts = {
        (one.device_id, batch): list(_fitting(one, batch, conditions, devices))
        for one in devices
        for batch in range(1, total - len(devices) + 2)
    }
    return min(
        predict(plans, devices, conditions).step_s
        for batches in _batches(total, len(devices))
        for plans in _together(devices, batches, parts)
    )


def _batches(total: int, devices: int) -> Iterator[tuple[int, ...]]:
    for batches in itertools.product(range(1, total + 1), repeat=devices):
        if sum(batches) == total:
            yield batches


def _together(
    devices: Sequence[FleetDevice],
    batches: Sequence[int],
    parts: dict[tuple[DeviceId, int], list[DevicePlan]],
) -> Iterator[dict[DeviceId, DevicePlan]]:
    names = [one.device_id for one in devices]
    choices = [parts[key] for key in zip(names, batches, strict=True)]
    for plans in itertools.product(*choices):
        yield dict(zip(names, plans, strict=True))


def _fitting(
    device: FleetDevice, batch: int, conditions: Conditions, devices: Sequence[FleetDevice]
) -> Iterator[DevicePlan]:
    """Yield one plan for each split layer and number of micro-batches that fits."""
    blocks = conditions.architecture.block_count
    sizes = sorted({-(-batch // count) for count in range(1, batch + 1)})
    for split_layer, micro_batch in itertools.product(range(1, blocks + 1), sizes):
        if micro_batch > device.terms.batch:
            continue
        for in_flight in range(device.terms.in_flight, 0, -1):
            plan = part(
                conditions.architecture,
                split_layer,
                lora=device.terms.lora,
                batch=batch,
                micro_batch=micro_batch,
                in_flight=in_flight,
            )
            found = predict({device.device_id: plan}, devices, conditions)
            limit = device.memory_limit_bytes
            if limit is None or found.devices[device.device_id].memory_bytes <= limit:
                yield plan
                break
