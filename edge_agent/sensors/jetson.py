"""A Jetson: what its kernel says in /sys where NVML answers "not supported".

The GPU shares the machine's memory. Places differ by generation: Nano, TX2, Xavier, Orin, Thor;
JetPack 4 to 7.
"""

from __future__ import annotations

import re
import threading

from edge_agent.sensors.kernel_files import KernelFiles, integer, printable, within
from shared.protocol.profile import DeviceFacts, Telemetry

_RELEASE = "etc/nv_tegra_release"
_MODEL = "proc/device-tree/model"
_COMPATIBLE = "proc/device-tree/compatible"
_SOC = "sys/devices/soc0"
"""In a container the three above are hidden, and this remains."""
_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/bus@0/17000000.gpu/load",
    "sys/devices/platform/17000000.gpu/load",
    "sys/devices/gpu.0/load",
)
_DEVFREQ = "sys/class/devfreq"
_GPU = re.compile(r".*\.(gpu|ga10b|gv11b|gp10b|gm20b)|gpu-gpc-0")
_MODE = "var/lib/nvpmodel/status"
_MODES = "etc/nvpmodel.conf"
_HWMON = "sys/class/hwmon"
_CHANNELS = (1, 2, 3)
"""Of an INA3221; a seventh is the sum of its shunts, which is no power."""
_WHOLE_MODULE = ("VDD_IN", "POM_5V_IN")
_OVER_CURRENT = ("oc1_event_cnt", "oc2_event_cnt", "oc3_event_cnt")


class JetsonReader:
    """A Jetson's own files. Any thread."""

    def __init__(self, files: KernelFiles) -> None:
        """Begin to count over-current events."""
        self._files = files
        self._lock = threading.Lock()
        self._events = self._over_current_events()

    def facts(self) -> DeviceFacts:
        """Return which Jetson it is, its Jetson Linux release and its power mode."""
        model = self._files.label(_MODEL) or self._files.label(f"{_SOC}/machine")
        return DeviceFacts(
            accelerator=model or "NVIDIA Jetson",
            accelerator_shares_memory=True,
            driver=_release(self._files.text(_RELEASE)),
            power_mode=_power_mode(self._files),
        )

    def read(self) -> Telemetry:
        """Return the GPU's load and clock, the power drawn, and what kept it down meanwhile."""
        now = self._over_current_events()
        with self._lock:
            before, self._events = self._events, now
        # Not "throttled": at full power these come by the second, and cost little each.
        kept_down = before is not None and now is not None and now > before
        return Telemetry(
            accelerator_load_percent=self._load_percent(),
            accelerator_clock_mhz=self._clock_mhz(),
            power_w=_power_w(self._files),
            throttle_reasons=("over-current",) if kept_down else (),
        )

    def _load_percent(self) -> float | None:
        places = (*_LOADS, *(f"{_DEVFREQ}/{name}/device/load" for name in self._gpus()))
        for place in places:
            permille = self._files.number(place)
            if permille is not None:
                return within(permille / 10, low=0, high=100)
        return None

    def _clock_mhz(self) -> float | None:
        for name in self._gpus():
            hertz = self._files.number(f"{_DEVFREQ}/{name}/cur_freq")
            if hertz is not None:
                return within(hertz / 1e6, low=0, high=1e5)
        return None

    def _gpus(self) -> list[str]:
        return [name for name in self._files.names(_DEVFREQ) if _GPU.fullmatch(name)]

    def _over_current_events(self) -> int | None:
        counts = [
            self._files.number(f"{_HWMON}/{chip}/{counter}")
            for chip in self._files.names(_HWMON)
            if self._files.label(f"{_HWMON}/{chip}/name") == "soctherm_oc"
            for counter in _OVER_CURRENT
        ]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None


def is_jetson(files: KernelFiles) -> bool:
    """Say whether this machine is a Jetson: by any of the marks that its kernel and system set."""
    return (
        files.text(_RELEASE) is not None
        or "nvidia,tegra" in (files.text(_COMPATIBLE) or "")
        or (files.label(f"{_SOC}/family") or "").startswith("Tegra")
        or any(files.number(place) is not None for place in _LOADS)
    )


def _release(text: str | None) -> str | None:
    """Return "L4T R36.4.3" for "# R36 (release), REVISION: 4.3, …"."""
    found = re.match(r"# R(\d{1,4}) \(release\), REVISION: ([0-9.]{1,20})", text or "", re.ASCII)
    return f"L4T R{found[1]}.{found[2]}" if found else None


def _power_mode(files: KernelFiles) -> str | None:
    """Return the power mode's name, or its number where the modes are not listed."""
    modes = files.text(_MODES) or ""
    chosen = re.search(r"pmode:([0-9]{1,4})", files.text(_MODE) or "")
    # Nothing was ever chosen on this machine: it runs in its default.
    chosen = chosen or re.search(r"PM_CONFIG\s+DEFAULT=([0-9]{1,4})", modes)
    number = integer(chosen[1]) if chosen else None
    if number is None:
        return None
    named = re.search(rf"POWER_MODEL\s+ID={number}\s+NAME=([^\s>]+)", modes)
    return (printable(named[1]) if named else None) or f"mode {number}"


def _power_w(files: KernelFiles) -> float | None:
    """Return the power of the module: its input's, or else the sum of all measured rails."""
    rails = dict(_rails(files))
    for name in _WHOLE_MODULE:
        if name in rails:
            return within(rails[name], low=0, high=1e4)
    return within(sum(rails.values()), low=0, high=1e4) if rails else None


def _rails(files: KernelFiles) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for chip in files.names(_HWMON):
        folder = f"{_HWMON}/{chip}"
        if files.label(f"{folder}/name") != "ina3221":
            continue
        for channel in _CHANNELS:
            label = files.label(f"{folder}/in{channel}_label")
            millivolts = files.number(f"{folder}/in{channel}_input")
            milliamperes = files.number(f"{folder}/curr{channel}_input")
            if label and millivolts is not None and milliamperes is not None:
                found.append((label, millivolts * milliamperes / 1e6))
    return found
