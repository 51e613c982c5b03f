"""What a device is, how it is now, and what training may use: `open_sensors`.

Sources: NVIDIA's driver (`nvml`), a Jetson's kernel files (`jetson`), any Linux's (`host`).
None of them is needed; torch and pynvml are not imported with this package.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.sensors.base import Sensors
from edge_agent.sensors.jetson import JetsonReader, is_jetson
from edge_agent.sensors.kernel_files import KernelFiles
from edge_agent.sensors.machine import MachineSensors
from edge_agent.sensors.nvml import open_nvml

__all__ = ["Sensors", "open_sensors"]


def open_sensors(*, root: Path = Path("/"), gpu: int | None = 0) -> Sensors:
    """Return the sensors of this machine, whatever it has.

    ``root``: where /proc, /sys and /etc are. ``gpu``: CUDA's number of the GPU that training
    computes on; None: NVIDIA's driver is left alone.
    """
    files = KernelFiles(root)
    return MachineSensors(
        files,
        jetson=JetsonReader(files) if is_jetson(files) else None,
        nvml=None if gpu is None else open_nvml(gpu, files),
    )
