"""Which parts fit: into each device's memory, and beside what the server has room for. Pure.

Shape suffixes: F devices, K split layers, M micro-batch sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.cost_book import CostBook
from coordinator.planning.options import Grid, Options, options_of
from coordinator.planning.server_room import ServerRoom
from shared.errors import PlanError
from shared.protocol.messages import DeviceId

Integers: TypeAlias = npt.NDArray[np.int64]

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of a device's adapter parameters: only where no part fits with all of them, fewer are tried."""

AT_ONCE = 256
"""Devices in one array: what a processor's cache still holds."""


class PossibleParts:
    """Finds what the devices of a fleet could do; ``refused`` says who can do nothing, and why."""

    def __init__(self, book: CostBook, conditions: Conditions, room: ServerRoom) -> None:
        """Start with nobody refused."""
        self._book = book
        self._conditions = conditions
        self._room = room
        self._split_layer_K = np.arange(1, conditions.architecture.block_count + 1)
        self.refused: dict[DeviceId, str] = {}

    def of(self, devices: Sequence[FleetDevice]) -> list[Options]:
        """Return the options of all devices that can do anything; they measured themselves.

        A stated split layer is taken whatever the memory.
        """
        found: dict[DeviceId, Options] = {}
        left = [one for one in devices if self._is_sound(one)]
        # Factors that are averaged must be of one rank, so nobody can have fewer parameters.
        for share in SHARES[:1] if self._conditions.hand_back == "average" else SHARES:
            for alike in _alike(left):
                found.update(self._options(self._fitting(alike, share)))
            left = [one for one in left if one.device_id not in found]
        for device in left:
            if device.terms.split_layer is None:
                self.refused[device.device_id] = self._too_small(device)
            else:
                found.update(self._options(_stated(device, device.terms.split_layer)))
        return [found[one.device_id] for one in devices if one.device_id in found]

    def _options(self, grid: Grid) -> dict[DeviceId, Options]:
        return options_of(grid, self._book, keeps_batch=not self._conditions.balance_batches)

    def _is_sound(self, device: FleetDevice) -> bool:
        try:
            self._book.of(device)
            self._check_head(device)
            stated = device.terms.split_layer
            if stated is not None:
                self._conditions.architecture.check_split_layer(stated)
            elif self._most_blocks(device) < self._room.least_split_layer:
                raise PlanError(self._too_few_blocks(device))
        except PlanError as error:
            self.refused[device.device_id] = str(error)
            return False
        return True

    def _check_head(self, device: FleetDevice) -> None:
        measured = device.measurements
        here = self._conditions.training.labels == "device"
        if here and measured is not None and not measured.head:
            raise PlanError(
                f"{device.device_id} did not measure the head, which labels: device puts on it: "
                "let it measure again while it is idle (hsplit-agent profile --fresh)"
            )

    def _most_blocks(self, device: FleetDevice) -> int:
        limits = (self._conditions.most_blocks, device.most_blocks)
        return min([len(self._split_layer_K), *(one for one in limits if one is not None)])

    def _fitting(self, devices: Sequence[FleetDevice], share: float) -> Grid:
        """Return what fits devices of equal terms with this share of their parameters."""
        micro_batch_M = _micro_batches(devices[0])
        costs = self._book.of_all(devices, axes=2)
        cut = self._book.cuts(devices, self._split_layer_K, share=share)
        limits = (one.memory_limit_bytes for one in devices)
        limit_F = [np.inf if limit is None else float(limit) for limit in limits]
        limit_F11 = np.array(limit_F)[:, None, None]
        in_flight_FKM = sum(
            (costs.memory_bytes(cut, micro_batch_M, at_once=at_once) <= limit_F11).astype(np.int64)
            for at_once in range(1, devices[0].terms.in_flight + 1)
        )
        wanted = devices[0].terms.micro_batch
        small_F1M = micro_batch_M * costs.longest <= self._room.most_tokens
        sizes_F1M = (micro_batch_M <= wanted) | small_F1M
        allowed_FKM = self._allowed(devices)[:, :, None] & sizes_F1M
        return Grid(
            devices=devices,
            share=share,
            split_layer_K=self._split_layer_K,
            micro_batch_M=micro_batch_M,
            in_flight_FKM=in_flight_FKM * allowed_FKM,
        )

    def _allowed(self, devices: Sequence[FleetDevice]) -> npt.NDArray[np.bool_]:
        """Return which split layers the settings, the server and experience allow, (F, K)."""
        k = self._split_layer_K
        least, only = self._room.least_split_layer, self._conditions.only_split_layer
        open_K = (k >= least) & ((k == only) | (only is None))
        return np.array(
            [
                open_K & (k <= self._most_blocks(one))
                if one.terms.split_layer is None
                else k == one.terms.split_layer
                for one in devices
            ]
        )

    def _too_few_blocks(self, device: FleetDevice) -> str:
        most, least = self._most_blocks(device), self._room.least_split_layer
        if least == 1:
            return f"{device.device_id} could not prepare even one block: give it more memory"
        return (
            f"{device.device_id} could prepare {most} blocks at most, and the server's memory "
            f"leaves at least {least} to each device: lower plan.micro_batch or "
            "devices.open_micro_batches"
        )

    def _too_small(self, device: FleetDevice) -> str:
        blocks = self._conditions.only_split_layer or self._room.least_split_layer
        size = int(_micro_batches(device)[0])
        costs = self._book.of(device)
        cut = self._book.cut(device, blocks, share=SHARES[-1])
        needed = float(costs.memory_bytes(cut, size, at_once=1))
        limit = device.memory_limit_bytes or 0
        what = (
            "one block" if blocks == 1 else f"the {blocks} blocks that the server has no room for"
        )
        return (
            f"{device.device_id} may use {limit / 2**20:.0f} MiB, but {what} with micro-batches of "
            f"{size} x {costs.longest:.0f} tokens needs about {needed / 2**20:.0f} MiB: raise its "
            "memory_limit, or lower plan.micro_batch or training.max_length"
        )


def _alike(devices: Sequence[FleetDevice]) -> Iterator[list[FleetDevice]]:
    """Yield devices whose terms allow the same sizes, not too many at once."""

    def key(device: FleetDevice) -> tuple[int, ...]:
        terms = device.terms
        return terms.batch, terms.micro_batch, terms.in_flight, terms.micro_batch_is_stated

    for _, group in itertools.groupby(sorted(devices, key=key), key):
        alike = list(group)
        yield from (alike[i : i + AT_ONCE] for i in range(0, len(alike), AT_ONCE))


def _micro_batches(device: FleetDevice) -> Integers:
    """Return the sizes to try: up to the batch, ever further apart, and the one that is wanted."""
    wanted, batch = device.terms.micro_batch, device.terms.batch
    if device.terms.micro_batch_is_stated:
        return np.array([wanted])
    powers = 2 ** np.arange(batch.bit_length())
    return np.unique(np.concatenate([powers, powers[:-1] * 3 // 2, [wanted, batch]]))


def _stated(device: FleetDevice, split_layer: int) -> Grid:
    """Return the one part that the settings state, though it does not fit."""
    return Grid(
        devices=[device],
        share=1.0,
        split_layer_K=np.array([split_layer]),
        micro_batch_M=np.array([device.terms.micro_batch]),
        in_flight_FKM=np.array([[[device.terms.in_flight]]]),
    )
