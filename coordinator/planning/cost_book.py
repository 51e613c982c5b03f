"""The costs of a fleet's devices and of its server, under one run's conditions. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from coordinator.planning.adapter_sizes import SizeBook, residual_growth
from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.cost_model import (
    Cut,
    DeviceCosts,
    Integers,
    Numbers,
    ServerCosts,
)
from shared.costs import Costs, fit, stacked
from shared.protocol.profile import DataShape, LinkMeasurement, Measurements
from shared.protocol.tensors import ITEM_BYTES
from shared.terms import TrainingTerms

FREE_LINK = LinkMeasurement(uplink_bytes_per_s=1e14, downlink_bytes_per_s=1e14, round_trip_s=1e-9)

fitted: Callable[[Measurements], Costs] = functools.lru_cache(maxsize=65_536)(fit)
"""The costs that measurements mean; kept, because a fleet is planned again and again."""


class CostBook:
    """Knows what everything costs. All devices of the fleet count: residuals grow with them."""

    def __init__(self, devices: Sequence[FleetDevice], conditions: Conditions) -> None:
        """Look at the server.

        Raises:
            PlanError: its measurements cannot be true.
        """
        self._conditions = conditions
        self.most_blocks = conditions.most_blocks
        self._sizes = SizeBook(conditions, growth=residual_growth(devices, conditions))
        rest = self._sizes.of(conditions.server_lora).rest
        self.server = ServerCosts(
            own=None if conditions.server is None else fitted(conditions.server),
            slowdown=conditions.server_slowdown,
            block_count=conditions.architecture.block_count,
            parameters=rest.parameters,
            residual_bytes=rest.residual_bytes,
        )

    def of(self, device: FleetDevice) -> DeviceCosts:
        """Return the costs of one device that measured itself.

        Raises:
            PlanError: its measurements cannot be true.
        """
        return self._costs(_fitted(device), _numbers(device, self._conditions.training))

    def of_all(self, devices: Sequence[FleetDevice], *, axes: int) -> DeviceCosts:
        """Return the costs of several at once, as arrays (F, 1, …) of ``axes`` more axes.

        Raises:
            PlanError: somebody's measurements cannot be true.
        """
        shape = (-1,) + (1,) * axes
        rows = [_numbers(device, self._conditions.training) for device in devices]
        columns = {name: np.array([row[name] for row in rows]).reshape(shape) for name in rows[0]}
        return self._costs(stacked([_fitted(device) for device in devices], shape=shape), columns)

    def cut(self, device: FleetDevice, split_layer: Integers, *, share: float = 1.0) -> Cut:
        """Return what these split layers mean for a device, with ``share`` of its parameters."""
        sizes = self._sizes.of(device.terms.lora)
        return Cut(
            split_layer=split_layer,
            parameters=share * sizes.parameters[split_layer],
            back_parameters=self.server.parameters[split_layer],
            residual_bytes=sizes.residual_bytes[split_layer],
        )

    def cuts(
        self, devices: Sequence[FleetDevice], split_layer_K: npt.NDArray[np.int64], *, share: float
    ) -> Cut:
        """Return what every split layer means for every device, as arrays (F, K, 1)."""
        sizes = [self._sizes.of(device.terms.lora) for device in devices]
        parameters_FL = np.stack([one.parameters for one in sizes])
        residual_FL = np.stack([one.residual_bytes for one in sizes])
        return Cut(
            split_layer=split_layer_K[:, None],
            parameters=share * parameters_FL[:, split_layer_K, None],
            back_parameters=self.server.parameters[split_layer_K, None],
            residual_bytes=residual_FL[:, split_layer_K, None],
        )

    def _costs(self, own: Costs, numbers: Mapping[str, Numbers]) -> DeviceCosts:
        architecture, training = self._conditions.architecture, self._conditions.training
        return DeviceCosts(
            own=own,
            **numbers,
            block_count=architecture.block_count,
            hidden_bytes=architecture.hidden_size * ITEM_BYTES[training.wire_dtype],
            head=training.labels == "device",
            classifies=architecture.classifies,
        )


def longest_shape(training: TrainingTerms) -> DataShape:
    """Return what is assumed of data that nobody described: all as long as may be."""
    longest = training.max_length
    return DataShape(mean_length=longest, padded_length=longest, longest=longest)


def _fitted(device: FleetDevice) -> Costs:
    assert device.measurements is not None  # the caller has looked
    return fitted(device.measurements)


def _numbers(device: FleetDevice, training: TrainingTerms) -> dict[str, float]:
    shape, link = device.data or longest_shape(training), device.link or FREE_LINK
    return {
        "slowdown": device.slowdown,
        "mean_length": shape.mean_length,
        "padded_length": shape.padded_length,
        "longest": float(shape.longest),
        "uplink_bytes_per_s": link.uplink_bytes_per_s,
        "downlink_bytes_per_s": link.downlink_bytes_per_s,
        "round_trip_s": link.round_trip_s,
    }
