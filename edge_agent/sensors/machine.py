"""The sensors of this machine: what each source says, put together."""

from __future__ import annotations

import dataclasses
import logging
import threading
from dataclasses import dataclass

from edge_agent.sensors import memory
from edge_agent.sensors.base import merged_facts, merged_telemetry
from edge_agent.sensors.host import HostReader
from edge_agent.sensors.jetson import JetsonReader
from edge_agent.sensors.kernel_files import KernelFiles
from edge_agent.sensors.nvml import GpuReading, NvmlReader
from shared.protocol.profile import DeviceFacts, Telemetry

logger = logging.getLogger(__name__)

_RESERVED_SHARE = 0.05
_LEAST_RESERVE_BYTES = 128 * 2**20
_MOST_RESERVE_BYTES = 2**30


def reserve_bytes(total_bytes: int) -> int:
    """Return what training leaves free: 5 % of the memory, at least 128 MiB, at most 1 GiB."""
    share = int(total_bytes * _RESERVED_SHARE)
    return min(max(share, _LEAST_RESERVE_BYTES), _MOST_RESERVE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """The memory that training computes in.

    ``own``: what would be free as well without this process; ``used``: what people would say
    that it has.
    """

    total: int
    free: int
    own: int
    used: int | None

    @property
    def takeable(self) -> int:
        return max(0, self.free - reserve_bytes(self.total))

    @property
    def usable(self) -> int:
        return max(1, self.free + self.own - reserve_bytes(self.total))


class MachineSensors:
    """`Sensors` of a Linux machine, with an NVIDIA GPU or without, or of a Jetson."""

    def __init__(
        self, files: KernelFiles, *, jetson: JetsonReader | None, nvml: NvmlReader | None
    ) -> None:
        """Put together what there is; ``nvml`` is closed by `close`."""
        self._files = files
        self._host = HostReader(files)
        self._jetson = jetson
        self._nvml = nvml
        self._lock = threading.Lock()
        self._warned = False

    def facts(self) -> DeviceFacts:
        """Return what this device is. See `Sensors`."""
        jetson = [self._jetson.facts()] if self._jetson else []
        return merged_facts([*jetson, self._gpu().facts, self._host.facts()])

    def read(self, *, on_gpu: bool | None = None) -> Telemetry:
        """Return how the device is now. See `Sensors`."""
        if on_gpu is None:
            on_gpu = self._nvml is not None or self._jetson is not None
        gpu = self._gpu() if on_gpu else GpuReading()
        jetson = [self._jetson.read()] if self._jetson else []
        found = self._memory(gpu, on_gpu=on_gpu)
        return dataclasses.replace(
            merged_telemetry([*jetson, gpu.telemetry, self._host.read()]),
            free_memory_bytes=found.takeable if found else None,
            used_memory_bytes=found.used if found else None,
        )

    def memory_bytes(self, *, on_gpu: bool) -> int | None:
        """Return what training may use in all, now. See `Sensors`."""
        found = self._memory(self._gpu() if on_gpu else GpuReading(), on_gpu=on_gpu)
        if found is None and on_gpu:
            self._warn()
        return found.usable if found else None

    def close(self) -> None:
        """Let go of the driver."""
        if self._nvml:
            self._nvml.close()

    def _gpu(self) -> GpuReading:
        return self._nvml.reading() if self._nvml else GpuReading()

    def _memory(self, gpu: GpuReading, *, on_gpu: bool) -> _Memory | None:
        if gpu.memory is not None:
            own = gpu.memory.own
            return _Memory(total=gpu.memory.total, free=gpu.memory.free, own=own or 0, used=own)
        if on_gpu and not (self._jetson or gpu.facts.accelerator_shares_memory):
            return None
        return _host_memory(self._files)

    def _warn(self) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            logger.warning(
                "nothing says how much memory this GPU has free: install hsplit[nvidia] if it is "
                "NVIDIA's, or set memory_limit to what training may use of it"
            )


def _host_memory(files: KernelFiles) -> _Memory | None:
    total, free = memory.total_bytes(files), memory.available_bytes(files)
    if total is None or free is None:
        return None
    return _Memory(
        total=total,
        free=min(free, total),
        own=memory.own_bytes(files),
        used=memory.resident_bytes(files),
    )
