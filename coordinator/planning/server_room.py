"""What the server's memory means for everybody's split layer. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.cost_model import ServerCosts
from shared.errors import PlanError

SHARE_BYTES_PER_PARAMETER = 4
"""Each device's gradients of the open step are kept apart until it closes."""


@dataclass(frozen=True, slots=True)
class ServerRoom:
    """No device may hold fewer than ``least_split_layer`` blocks.

    ``most_tokens``: of one micro-batch (padded), which that counts on; inf without a limit.
    """

    least_split_layer: int
    most_tokens: float


def server_room(
    devices: Sequence[FleetDevice], server: ServerCosts, conditions: Conditions
) -> ServerRoom:
    """Return the most that the server can take off devices.

    Counted with as many open micro-batches as there may be at once, each of the size that
    devices' terms say: a size beyond that is planned only where the server has no limit.

    Raises:
        PlanError: it has no room for the head and one micro-batch (with both numbers).
    """
    limit = None if conditions.server is None else conditions.server.memory_bytes
    if limit is None:
        return ServerRoom(1, math.inf)
    tokens = max(device.terms.micro_batch * _longest(device, conditions) for device in devices)
    open_ = min(conditions.open_micro_batches, sum(device.terms.in_flight for device in devices))
    head = conditions.training.labels == "server"
    first_block_K = np.arange(1, server.block_count + 1)
    needed_K = server.memory_bytes(first_block_K, tokens, open_=open_, head=head)
    needed_K += (len(devices) - 1) * SHARE_BYTES_PER_PARAMETER * server.parameters[first_block_K]
    fits = np.flatnonzero(needed_K <= limit)
    if len(fits):
        return ServerRoom(int(first_block_K[fits[0]]), tokens)
    if not head:  # then it may hold nothing at all
        return ServerRoom(server.block_count, tokens)
    raise PlanError(
        f"the server may use {limit / 2**20:.0f} MiB, but its head alone with {open_} open "
        f"micro-batches of {tokens:.0f} tokens needs about {needed_K[-1] / 2**20:.0f} MiB: lower "
        "devices.open_micro_batches, plan.micro_batch or training.max_length"
    )


def _longest(device: FleetDevice, conditions: Conditions) -> int:
    return conditions.training.max_length if device.data is None else device.data.longest
