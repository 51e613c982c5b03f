"""Any Linux machine: processor, memory and heat as the kernel tells them to all users."""

from __future__ import annotations

from edge_agent.sensors import memory, processor, thermal
from edge_agent.sensors.kernel_files import KernelFiles
from shared.protocol.profile import DeviceFacts, Telemetry


class HostReader:
    """The machine itself, but for its free memory: the GPU's may be what counts. Any thread."""

    def __init__(self, files: KernelFiles) -> None:
        """Begin to count loads."""
        self._files = files
        self._load = processor.CpuLoad(files)
        self._throttling = thermal.Throttling(files)

    def facts(self) -> DeviceFacts:
        """Return memory and CPUs."""
        return DeviceFacts(
            memory_bytes=memory.total_bytes(self._files) or None,
            cpus=processor.cpus(self._files),
        )

    def read(self) -> Telemetry:
        """Return load and heat."""
        reasons = self._throttling.reasons()
        return Telemetry(
            cpu_load_percent=self._load.percent(),
            temperature_c=thermal.temperature_c(self._files),
            throttled=None if reasons is None else bool(reasons),
            throttle_reasons=reasons or (),
        )
