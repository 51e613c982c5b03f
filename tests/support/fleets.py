"""Devices and servers that never were, with measurements as a probe would have made them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.device_plan import DevicePlan, adapted
from coordinator.settings import DeviceTerms
from shared.architecture import ModelArchitecture
from shared.protocol.messages import DeviceId
from shared.protocol.profile import (
    BlockPoint,
    DataShape,
    HeadPoint,
    LinkMeasurement,
    Measurements,
    OptimizerPoint,
)
from shared.terms import LoraTerms, TrainingTerms
from tests.support.measured import measurements

SHAPE = DataShape(mean_length=90.0, padded_length=100.0, longest=128)
BLOCK_BYTES = 40_000_000
RUNTIME_BYTES = 250_000_000
TOKEN_BYTES = 4_000
TOKEN_BLOCK_BYTES = 60_000
STATE_BYTES = 16
POINTS = ((1, 1, 10_000), (1, 4, 10_000), (3, 1, 30_000), (3, 4, 30_000), (3, 4, 120_000))
"""(blocks, sequences, adapter parameters) of sequences of 128 tokens."""


def llama(blocks: int) -> ModelArchitecture:
    """Return a small model with this many blocks."""
    return ModelArchitecture.from_config(
        {
            "model_type": "llama",
            "vocab_size": 32_000,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": blocks,
            "num_attention_heads": 8,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine is: ``speed`` 1 does a block of 1000 tokens forward in 50 ms or so."""

    speed: float = 1.0
    memory_bytes: int | None = None
    uplink: float = 1e8
    downlink: float = 1e8
    round_trip_s: float = 0.002

    def measured(self, architecture: ModelArchitecture) -> Measurements:
        """Return what a probe of it would find."""
        blocks = tuple(self._block(*point) for point in POINTS)
        tokens = sorted({point.sequences * point.length for point in blocks})
        return measurements(
            model=architecture.fingerprint,
            runtime_bytes=RUNTIME_BYTES,
            memory_bytes=self.memory_bytes,
            blocks=blocks,
            head=tuple(
                HeadPoint(tokens=n, seconds=(1e-4 + 1e-5 * n) / self.speed, extra_bytes=2_000 * n)
                for n in tokens
            ),
            optimizer=tuple(
                OptimizerPoint(adapter_parameters=n, seconds=(1e-3 + 1e-9 * n) / self.speed)
                for n in (30_000, 120_000)
            ),
            link=LinkMeasurement(
                uplink_bytes_per_s=self.uplink,
                downlink_bytes_per_s=self.downlink,
                round_trip_s=self.round_trip_s,
            ),
        )

    def _block(self, blocks: int, sequences: int, adapter_parameters: int) -> BlockPoint:
        tokens = sequences * 128
        forward_s = 3e-4 + 1e-7 * tokens + blocks * (2e-4 + 5e-6 * tokens)
        forward_s = (forward_s + 1e-12 * adapter_parameters * tokens) / self.speed
        held = RUNTIME_BYTES + blocks * BLOCK_BYTES + STATE_BYTES * adapter_parameters
        return BlockPoint(
            blocks=blocks,
            adapter_parameters=adapter_parameters,
            sequences=sequences,
            length=128,
            forward_s=forward_s,
            backward_s=2 * forward_s,
            peak_bytes=held + tokens * (TOKEN_BYTES + blocks * TOKEN_BLOCK_BYTES),
        )


def terms(**changes: Any) -> DeviceTerms:
    """Return terms in which everything is left to the planner."""
    free = DeviceTerms(
        split_layer=None,
        batch=4,
        micro_batch=2,
        in_flight=2,
        memory_limit_bytes=None,
        lora=LoraTerms(r=8),
    )
    return dataclasses.replace(free, **changes)


def device(
    name: str, machine: Machine, architecture: ModelArchitecture, **changes: Any
) -> FleetDevice:
    """Return a device that measured itself; ``changes`` to its terms."""
    return FleetDevice(
        device_id=DeviceId(name),
        terms=terms(**changes),
        measurements=machine.measured(architecture),
        data=SHAPE,
    )


def part(
    architecture: ModelArchitecture,
    split_layer: int,
    *,
    lora: LoraTerms,
    batch: int = 4,
    micro_batch: int = 2,
    in_flight: int = 2,
) -> DevicePlan:
    """Return a part with the ranks that these terms say."""
    ranks, scalings = adapted(lora, architecture, range(split_layer))
    return DevicePlan(
        split_layer=split_layer,
        ranks=ranks,
        scalings=scalings,
        batch=batch,
        micro_batch=micro_batch,
        in_flight=in_flight,
    )


def conditions(
    architecture: ModelArchitecture,
    *,
    server: Machine | None = None,
    training: TrainingTerms | None = None,
    **changes: Any,
) -> Conditions:
    """Return a run's conditions, with a server of speed 4 where none is given."""
    return Conditions(
        architecture=architecture,
        training=training or TrainingTerms(max_length=128),
        server=(server or Machine(speed=4.0)).measured(architecture),
        hand_back=changes.pop("hand_back", "merge"),
        **changes,
    )
