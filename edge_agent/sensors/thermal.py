"""Heat: how hot the processor is, and whether the kernel slows it down for that."""

from __future__ import annotations

import re
import threading

from edge_agent.sensors.kernel_files import KernelFiles, within

_ZONES = "sys/class/thermal"
_HWMON = "sys/class/hwmon"
_PROCESSOR = re.compile(r"cpu|gpu|soc|pkg|^tj|^tdiode|^bcm", re.IGNORECASE)
"""Zones of the chip that computes: CPU-therm, gpu-thermal, tj-thermal, x86_pkg_temp …"""
_MEANINGLESS = re.compile(r"pmic-die|^int340|wifi|nvme|^bat", re.IGNORECASE)
"""Not the chip's; a Jetson's PMIC-Die always says 100 °C."""
_CPU_CHIPS = ("k10temp", "coretemp", "zenpower", "cpu_thermal")
_SLOWS_DOWN = re.compile(r"Processor|(thermal-)?cpufreq-.*|intel_powerclamp|.*-throttle-alert")
"""Cooling devices that slow the processor down, or that say it was; fans are none of them."""
_COUNTER = "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"


def temperature_c(files: KernelFiles) -> float | None:
    """Return the hottest of the processor's sensors; where none is known, of the machine's."""
    zones = [
        (kind, celsius)
        for zone in _numbered(files, _ZONES, "thermal_zone")
        if (kind := files.label(f"{zone}/type")) and not _MEANINGLESS.search(kind)
        if (celsius := _celsius(files, f"{zone}/temp")) is not None
    ]
    processor = [celsius for kind, celsius in zones if _PROCESSOR.search(kind)]
    return max(processor or _chips(files) or [celsius for _, celsius in zones], default=None)


class Throttling:
    """Whether the kernel slows the processor down because it is hot. Any thread."""

    def __init__(self, files: KernelFiles) -> None:
        """Begin to count."""
        self._files = files
        self._lock = threading.Lock()
        self._before = files.number(_COUNTER)

    def reasons(self) -> tuple[str, ...] | None:
        """Return what slows it down now, or did since the last call; None: nothing says."""
        cooling = _cooling(self._files)
        now = self._files.number(_COUNTER)
        with self._lock:
            before, self._before = self._before, now
        counted = before is not None and now is not None
        if not cooling and not counted:
            return None
        hot = ("processor heat",) if before is not None and now is not None and now > before else ()
        return (*hot, *(name for name, state in cooling if state > 0))


def _cooling(files: KernelFiles) -> list[tuple[str, int]]:
    return [
        (kind, state)
        for device in _numbered(files, _ZONES, "cooling_device")
        if (kind := files.label(f"{device}/type")) and _SLOWS_DOWN.fullmatch(kind)
        if (state := files.number(f"{device}/cur_state")) is not None
    ]


def _chips(files: KernelFiles) -> list[float]:
    """Return what CPUs say that have no thermal zone: AMD's, for one."""
    return [
        celsius
        for chip in _numbered(files, _HWMON, "hwmon")
        if files.label(f"{chip}/name") in _CPU_CHIPS
        if (celsius := _celsius(files, f"{chip}/temp1_input")) is not None
    ]


def _celsius(files: KernelFiles, path: str) -> float | None:
    millidegrees = files.number(path)
    # A part of the chip that is switched off answers with an error, or with -256 °C.
    return within(None if millidegrees is None else millidegrees / 1000, low=-60, high=150)


def _numbered(files: KernelFiles, folder: str, prefix: str) -> list[str]:
    return [f"{folder}/{name}" for name in files.names(folder) if name.startswith(prefix)]
