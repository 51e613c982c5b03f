"""What a device, or the server, measured of itself: facts for the planner, never promises.

A profile holds raw measurements; what follows from them is `shared.costs`. It travels in
`Ready`, and stands in the JSON files that ``hsplit-agent profile`` writes. Zero, negative and
NaN are no measurements: the types refuse them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import Field

from shared.protocol.message_parts import Count, Positive, Sha256, Text

Duration: TypeAlias = Annotated[float, Field(ge=1e-9, lt=1e6, allow_inf_nan=False)]
"""A measured time in seconds; no clock is finer than a nanosecond."""
Bytes: TypeAlias = Annotated[int, Field(ge=1, lt=2**63)]
Rate: TypeAlias = Annotated[float, Field(ge=1, lt=1e15, allow_inf_nan=False)]
"""Bytes per second."""
Spread: TypeAlias = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]
"""(slowest - fastest) / median of the repeats behind a median."""
Reading: TypeAlias = Annotated[float, Field(gt=-1e6, lt=1e9, allow_inf_nan=False)]

PROFILE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPoint:
    """One measured stack of blocks: a device's front with its embeddings, or a server's back.

    ``blocks`` blocks with ``adapter_parameters`` LoRA values in all of them, on one micro-batch
    of ``sequences`` x ``length`` tokens. Medians of one's training forward and backward pass.
    ``peak_bytes``: the most memory that the whole program took meanwhile, with ``in_flight`` such
    micro-batches in it at once and neither head nor optimizer; on a discrete GPU the GPU's memory.
    """

    blocks: Positive
    adapter_parameters: Count
    sequences: Positive
    length: Positive
    in_flight: Positive = 1
    forward_s: Duration
    backward_s: Duration
    spread: Spread = 0.0
    peak_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPoint:
    """The head's loss and its gradient for ``tokens`` tokens with a target.

    ``extra_bytes``: what it took of memory beside what was there before.
    """

    tokens: Positive
    seconds: Duration
    spread: Spread = 0.0
    extra_bytes: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerPoint:
    """One optimizer step over ``adapter_parameters`` LoRA values."""

    adapter_parameters: Count
    seconds: Duration


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMeasurement:
    """The way through the broker: device to broker, broker to device, and a small packet both."""

    uplink_bytes_per_s: Rate
    downlink_bytes_per_s: Rate
    round_trip_s: Duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What one program measured for one model.

    ``model``: `ModelArchitecture.fingerprint` of the model measured. ``runtime_bytes``: what the
    program takes before it holds anything of a model (Python, libraries, the GPU's context).
    ``memory_bytes``: what training may use in all, ``runtime_bytes`` included; None: no limit is
    known. ``on_gpu``: all of these bytes are the GPU's own memory.
    """

    version: Positive = PROFILE_VERSION
    hsplit_version: Annotated[str, Field(max_length=64)]
    backend: Annotated[str, Field(max_length=64)]
    dtype: Annotated[str, Field(max_length=16)]
    threads: Positive | None = None
    model: Sha256
    on_gpu: bool = False
    runtime_bytes: Bytes
    memory_bytes: Bytes | None = None
    blocks: Annotated[tuple[BlockPoint, ...], Field(min_length=3, max_length=64)]
    head: Annotated[tuple[HeadPoint, ...], Field(max_length=16)] = ()
    optimizer: Annotated[tuple[OptimizerPoint, ...], Field(max_length=16)] = ()
    link: LinkMeasurement | None = None
    computes_with: Text | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """How long a device's training sequences are, in tokens that pass through the model.

    ``padded_length``: the mean length that a sequence is computed at, padded to the longest of
    its micro-batch.
    """

    mean_length: Annotated[float, Field(ge=1, lt=2**31, allow_inf_nan=False)]
    padded_length: Annotated[float, Field(ge=1, lt=2**31, allow_inf_nan=False)]
    longest: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What sensors say a device is; what no sensor says is None."""

    accelerator: Text | None = None
    accelerator_memory_bytes: Bytes | None = None
    accelerator_shares_memory: bool = False
    """Whether the GPU lives in the machine's own memory, as a Jetson's does."""
    driver: Text | None = None
    power_mode: Text | None = None
    memory_bytes: Bytes | None = None
    """Of the machine, or of the container's limit where that is smaller."""
    cpus: Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a device says of itself when it joins; every measured field is optional.

    ``computes_with``: the library that computes, its version, and what of the device it computes
    on, such as ``onnxruntime 1.31.1, CUDAExecutionProvider 0``.
    """

    backend: Annotated[str, Field(max_length=64)]
    hsplit_version: Annotated[str, Field(max_length=64)]
    machine: Text = ""
    accelerator: Text | None = None
    memory_limit_bytes: Positive | Count | None = None
    sequences: Positive
    evaluation_sequences: Count
    facts: DeviceFacts = DeviceFacts()
    computes_with: Text | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """How a device is while it works; what no sensor says is None. Percent are 0 to 100."""

    accelerator_load_percent: Reading | None = None
    accelerator_clock_mhz: Reading | None = None
    cpu_load_percent: Reading | None = None
    temperature_c: Reading | None = None
    power_w: Reading | None = None
    free_memory_bytes: Count | None = None
    """What training could take beyond what it has: of the GPU where it computes on one."""
    used_memory_bytes: Count | None = None
    """What this program has."""
    throttled: bool | None = None
    throttle_reasons: Annotated[tuple[Text, ...], Field(max_length=16)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFile:
    """The contents of a file that ``hsplit-agent profile --output`` writes."""

    device_id: Annotated[str, Field(max_length=64)]
    machine: Text = ""
    facts: DeviceFacts = DeviceFacts()
    data: DataShape | None = None
    measurements: Measurements
