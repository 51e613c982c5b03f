"""NVIDIA's own sensors, through `nvidia-ml-py` (`pynvml`): every answer may be missing.

Without package, library, driver or GPU there is nothing to read, and that is normal. A driver
that is there but broken is said once, in one warning; from then on it is as if it were not
there, or as if it did not know what it does not answer.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from typing import Any

from edge_agent.sensors import nvml_library
from edge_agent.sensors.kernel_files import KernelFiles, printable, within
from edge_agent.sensors.nvml_library import NoGpu, OpenedGpu, Questions, bounded
from shared.protocol.profile import DeviceFacts, Telemetry

logger = logging.getLogger(__name__)

_MOST_BYTES = 2**50
_SLOWED = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_KEPT_DOWN = {0x04: "power cap", 0x200: "board limit", 0x400: "reliability limit"}
"""Ordinary at full load, so no throttling; what these cost is in every measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Bytes of a GPU's own memory. ``own``: what this process has of it; None: nothing says."""

    total: int
    free: int
    own: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """All answers of one moment. ``memory`` None: the driver does not say, or there is none."""

    facts: DeviceFacts = field(default_factory=DeviceFacts)
    telemetry: Telemetry = field(default_factory=Telemetry)
    memory: GpuMemory | None = None


class NvmlReader:
    """One GPU. Any thread; made by `open_nvml`.

    One question at a time. Where the driver hangs, the first call returns after
    `nvml_library.ANSWER_WITHIN_S` with nothing, and so do all others at once.
    """

    def __init__(self, gpu: OpenedGpu) -> None:
        """Read ``gpu``."""
        self._gpu = gpu
        self._lock = threading.Lock()
        self._given_up = False
        self._warned = False

    def reading(self) -> GpuReading:
        """Return all answers; after `close`, or where the driver hangs, nothing."""
        with self._lock:
            if self._given_up:
                return GpuReading()
            found = bounded(lambda: _take(self._gpu))
            if found is None:
                self._given_up = True
                self._warn({"anything": _silence()})
                return GpuReading()
            reading, odd = found
            self._warn(odd)
            return reading

    def close(self) -> None:
        """Let go of the driver."""
        with self._lock:
            if not self._given_up:
                self._given_up = True
                bounded(self._gpu.close)

    def _warn(self, odd: dict[str, str]) -> None:
        if odd and not self._warned:
            self._warned = True
            logger.warning(
                "the NVIDIA driver does not answer as it should, going on without: %s; "
                "`nvidia-smi -q` may say more",
                ", ".join(f"{what} ({why})" for what, why in odd.items()),
            )


def open_nvml(gpu: int, files: KernelFiles) -> NvmlReader | None:
    """Return the reader of the GPU that CUDA calls ``gpu`` in this process; None: there is none.

    CUDA_VISIBLE_DEVICES, as the process was started with it, is obeyed. Numbers count in
    the order of the bus, as CUDA's do with CUDA_DEVICE_ORDER=PCI_BUS_ID or equal GPUs.
    """
    which = visible_gpu(gpu, _visible_devices(files))
    if which is None:
        return None
    opened = bounded(lambda: nvml_library.open_gpu(which)) or NoGpu(_silence())
    if isinstance(opened, OpenedGpu):
        return NvmlReader(opened)
    if opened.why is not None:
        logger.warning(
            "the NVIDIA driver does not work, going on without its sensors: %s; "
            "`nvidia-smi` may say more",
            opened.why,
        )
    return None


def _silence() -> str:
    return f"no answer within {nvml_library.ANSWER_WITHIN_S:g} s"


def visible_gpu(gpu: int, visible: str | None) -> int | str | None:
    """Return what CUDA's ``gpu`` is: a number on the bus, a UUID, or None: it is hidden.

    ``visible`` is CUDA_VISIBLE_DEVICES: numbers or UUIDs, up to the first that makes no sense.
    """
    if visible is None:
        return gpu
    entries = [entry.strip() for entry in visible.split(",")]
    sensible = [_is_number(entry) or entry.startswith(("GPU-", "MIG-")) for entry in entries]
    if not 0 <= gpu < len(entries) or not all(sensible[: gpu + 1]):
        return None
    return int(entries[gpu]) if _is_number(entries[gpu]) else entries[gpu]


def _is_number(entry: str) -> bool:
    return entry.isascii() and entry.isdigit() and len(entry) < 5


def _visible_devices(files: KernelFiles) -> str | None:
    for setting in (files.text("proc/self/environ") or "").split("\0"):
        name, _, value = setting.partition("=")
        if name == "CUDA_VISIBLE_DEVICES":
            return value
    return None


def _take(gpu: OpenedGpu) -> tuple[GpuReading, dict[str, str]]:
    """Ask everything; return the answers, and what was wrong with them."""
    questions = Questions(gpu)
    memory = _memory(gpu, questions)
    reading = GpuReading(
        facts=DeviceFacts(
            accelerator=_text(
                questions.ask("name", lambda: gpu.library.nvmlDeviceGetName(gpu.handle))
            ),
            accelerator_memory_bytes=None if memory is None else memory.total,
            # So it is on Jetsons, and on others whose GPU lives in the machine's memory.
            accelerator_shares_memory="memory" in questions.unsupported,
            driver=_text(questions.ask("driver", gpu.library.nvmlSystemGetDriverVersion)),
        ),
        telemetry=_telemetry(gpu, questions),
        memory=memory,
    )
    return reading, questions.odd


def _telemetry(gpu: OpenedGpu, questions: Questions) -> Telemetry:
    nvml, handle = gpu.library, gpu.handle
    load = questions.ask("load", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    clock = questions.ask("clock", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
    milliwatts = questions.ask("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    # The second of each pair is what older drivers have.
    celsius = questions.ask(
        "temperature",
        lambda: nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU),
        lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    )
    reasons = questions.ask(
        "throttle reasons",
        lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    )
    return Telemetry(
        accelerator_load_percent=within(load, low=0, high=100),
        accelerator_clock_mhz=within(clock, low=0, high=1e5),
        power_w=within(None if milliwatts is None else milliwatts / 1000, low=0, high=1e5),
        temperature_c=within(celsius, low=-60, high=150),
        throttled=None if reasons is None else any(reasons & bit for bit in _SLOWED),
        throttle_reasons=tuple(
            word for bit, word in (_SLOWED | _KEPT_DOWN).items() if (reasons or 0) & bit
        ),
    )


def _memory(gpu: OpenedGpu, questions: Questions) -> GpuMemory | None:
    nvml, handle = gpu.library, gpu.handle
    found = questions.ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    if found is None:
        return None
    if not 0 < found.total < _MOST_BYTES or not 0 <= found.free <= found.total:
        questions.odd["memory"] = f"{found.free} of {found.total} bytes free"
        return None
    processes = questions.ask(
        "processes",
        lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle),
        lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle),
    )
    return GpuMemory(total=found.total, free=found.free, own=_own_bytes(processes, found.total))


def _own_bytes(processes: list[Any] | None, total_bytes: int) -> int | None:
    """Return what this process has; None: not said, as in a container that hides real ids."""
    if processes is None:
        return None
    own: list[int | None] = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
    if processes and not own:
        return None
    return sum(used for used in own if used is not None and 0 <= used <= total_bytes)


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None
