"""What onnxruntime takes of a GPU's memory, seen from outside: it does not tell itself.

All that is used now is compared with all that was before onnxruntime came: on a GPU with memory
of its own by NVML, where it lives in the machine's (a Jetson, for which NVML has no such figure)
by what the machine has available. So it holds only while no other program takes or gives back
memory there. What an arena took it keeps, therefore what is used now is also the peak; one that
is lower than an earlier one is not seen, and a probe goes from the smaller to the larger.

Tried with a library that answers as NVML does, and with a Jetson's files; never with a GPU.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.sensors import memory
from edge_agent.sensors.jetson import JetsonReader, is_jetson
from edge_agent.sensors.kernel_files import KernelFiles
from edge_agent.sensors.nvml import GpuReading, open_nvml
from shared.errors import ConfigError
from shared.memory_use import (
    LEAST_CONTEXT_BYTES,
    TYPICAL_CONTEXT_BYTES,
    AcceleratorMemory,
)


class OnnxMemory:
    """The GPU that CUDA calls ``gpu`` in this process. Not thread-safe.

    Made before onnxruntime has anything there.
    """

    def __init__(self, gpu: int, *, root: Path = Path("/")) -> None:
        """Take note of what is used now; ``root``: where /proc, /sys and /etc are."""
        self._files = KernelFiles(root)
        self._nvml = open_nvml(gpu, self._files)
        reading = self._reading()
        jetson = JetsonReader(self._files).facts() if is_jetson(self._files) else None
        self._is_own = jetson is None and not reading.facts.accelerator_shares_memory
        self.name = (jetson or reading.facts).accelerator or f"GPU {gpu}"
        """The GPU's own name, as the sensors have it."""
        self._start_bytes = self._used_bytes()
        self._context_bytes = TYPICAL_CONTEXT_BYTES

    def context_made(self) -> None:
        """Count what came since as that of CUDA's context and its libraries.

        Where it is too little for these, they were there before.
        """
        now = self._used_bytes()
        if self._start_bytes is not None and now is not None:
            found = now - self._start_bytes
            self._context_bytes = found if found >= LEAST_CONTEXT_BYTES else TYPICAL_CONTEXT_BYTES
        self._start_bytes = now

    def taken(self) -> AcceleratorMemory:
        """Return what is used of the GPU's memory.

        Raises:
            ConfigError: nothing says what is used of it.
        """
        now = self._used_bytes()
        if now is None or self._start_bytes is None:
            raise ConfigError(
                f"nothing says how much memory of {self.name} is used, so this device cannot be "
                "measured: install hsplit[nvidia], or state its split_layer in the run's plan, "
                "or choose device: cpu"
            )
        used = max(0, now - self._start_bytes)
        return AcceleratorMemory(
            used_bytes=used,
            peak_bytes=used,
            runtime_bytes=self._context_bytes,
            is_own=self._is_own,
        )

    def close(self) -> None:
        """Let go of the driver."""
        if self._nvml is not None:
            self._nvml.close()

    def _reading(self) -> GpuReading:
        return GpuReading() if self._nvml is None else self._nvml.reading()

    def _used_bytes(self) -> int | None:
        """Return what all programs use of the GPU's memory, up to a constant."""
        if self._is_own:
            found = self._reading().memory
            return None if found is None else found.total - found.free
        available = memory.machine_available_bytes(self._files)
        # What this process has of the machine's memory by itself is counted elsewhere.
        return None if available is None else -available - memory.own_bytes(self._files)
