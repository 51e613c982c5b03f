"""The unequal fleet that methods are compared on: what each device is, and its emulated figures.

One machine is measured; a device's seconds are its seconds over the device's speed, its link and
memory are stated. Memory is stated in blocks of the model, so that budgets spread as the paper's
do (5 to 20 GB) whatever the model: the largest holds nearly all of it, the smallest one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.prediction import predict
from coordinator.settings import CoordinatorSettings
from shared.architecture import ModelArchitecture
from shared.protocol.messages import DeviceId
from shared.protocol.profile import DataShape, LinkMeasurement, Measurements
from tests.support.fleets import part

MEMORY_SPARE = 0.5
"""Of the memory of one more block: what a device has beside the blocks that it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedDevice:
    """``speed`` relative to the machine that was measured; ``blocks``: what its memory holds."""

    name: str
    speed: float
    mbit_per_s: float
    latency_ms: float
    rank: int
    blocks: int

    @property
    def link(self) -> LinkMeasurement:
        """Both ways alike."""
        rate = self.mbit_per_s * 1e6 / 8
        return LinkMeasurement(
            uplink_bytes_per_s=rate,
            downlink_bytes_per_s=rate,
            round_trip_s=max(1e-6, 2e-3 * self.latency_ms),
        )


FLEET = (
    EmulatedDevice(name="d1", speed=0.20, mbit_per_s=200, latency_ms=2, rank=16, blocks=5),
    EmulatedDevice(name="d2", speed=0.15, mbit_per_s=150, latency_ms=2, rank=8, blocks=4),
    EmulatedDevice(name="d3", speed=0.10, mbit_per_s=100, latency_ms=5, rank=8, blocks=3),
    EmulatedDevice(name="d4", speed=0.07, mbit_per_s=75, latency_ms=5, rank=4, blocks=2),
    EmulatedDevice(name="d5", speed=0.05, mbit_per_s=50, latency_ms=10, rank=4, blocks=1),
)
SERVER_SPEED = 1.0
"""The server computes as the measured machine does: 5 to 20 times as fast as a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the machine measured of itself: as an agent, and as a server."""

    agent: Measurements
    server: Measurements


def slowed(measured: Measurements, speed: float) -> Measurements:
    """Return what a machine of this speed would have measured."""
    return replace(
        measured,
        blocks=tuple(
            replace(one, forward_s=one.forward_s / speed, backward_s=one.backward_s / speed)
            for one in measured.blocks
        ),
        head=tuple(replace(one, seconds=one.seconds / speed) for one in measured.head),
        optimizer=tuple(replace(one, seconds=one.seconds / speed) for one in measured.optimizer),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedMachine:
    """Stands where a probe does: ``measured`` is what it would have found on the device."""

    device: EmulatedDevice
    machine: Machine
    settings: CoordinatorSettings
    shape: DataShape

    def measured(self, architecture: ModelArchitecture) -> Measurements:
        """Return the device's measurements, its memory limit among them."""
        found = replace(slowed(self.machine.agent, self.device.speed), link=self.device.link)
        return replace(found, memory_bytes=self._limit_bytes(found, architecture))

    def _limit_bytes(self, found: Measurements, architecture: ModelArchitecture) -> int:
        enough, more = (
            self._needed_bytes(found, architecture, blocks=self.device.blocks + n) for n in (0, 1)
        )
        return round(enough + MEMORY_SPARE * (more - enough))

    def _needed_bytes(
        self, found: Measurements, architecture: ModelArchitecture, *, blocks: int
    ) -> float:
        name = DeviceId(self.device.name)
        terms = self.settings.device_terms(name)
        plan = part(
            architecture,
            blocks,
            lora=terms.lora,
            batch=terms.batch,
            micro_batch=terms.micro_batch,
            in_flight=terms.in_flight,
        )
        device = FleetDevice(device_id=name, terms=terms, measurements=found, data=self.shape)
        conditions = Conditions.of(self.settings, architecture, server=None)
        return predict({name: plan}, [device], conditions).devices[name].memory_bytes


def total_rank(fleet: Sequence[EmulatedDevice]) -> int:
    """Return the sum of the devices' ranks: equal ranks take as many parameters in all."""
    return sum(device.rank for device in fleet)
