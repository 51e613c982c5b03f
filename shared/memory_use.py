"""What this program takes of memory, now and at its peak: the host's, and an accelerator's.

Linux counts a process's peak by itself (``VmHWM``) and starts anew when it is told to; where it
may not be told (some containers mount /proc read-only) a thread samples instead. Before a peak is
counted, memory that was freed but kept by the C library goes back to the system: otherwise what
earlier work left behind would hide what the next needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.errors import ConfigError

LOWER_IN_A_RUN = "plan.micro_batch, plan.in_flight or training.max_length"
"""What a run can do about a memory that is full."""

TYPICAL_CONTEXT_BYTES = 512 * 2**20
"""What CUDA's context and its libraries take, where NVML does not tell: 300 to 600 MiB."""
LEAST_CONTEXT_BYTES = 64 * 2**20
"""A difference below this means that the context was there before."""

SAMPLE_EVERY_S = 0.002
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc_pid_clear_refs
_LINE = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class AcceleratorMemory:
    """Bytes that this process has on an accelerator, and its peak since the last restart.

    ``runtime_bytes``: what the accelerator's own context takes beside these. ``is_own``: the
    accelerator has memory of its own; otherwise all of this is a part of the machine's.
    """

    used_bytes: int
    peak_bytes: int
    runtime_bytes: int
    is_own: bool


class MeasuresAccelerator(Protocol):
    """Whoever computes on an accelerator, or not."""

    def restart_memory_peak(self) -> None:
        """Finish what is under way, give back what is unused, and count the peak from here."""

    def accelerator_memory(self) -> AcceleratorMemory | None:
        """Return what is used of the accelerator's memory; None where the CPU computes."""


@dataclass(slots=True)
class MemoryPeak:
    """Bytes of the whole program at the start of a `watched_peak`, and its peak at the end.

    On an accelerator with memory of its own: that memory alone.
    """

    start_bytes: int
    peak_bytes: int

    @property
    def rise_bytes(self) -> int:
        """How far the peak is above the start."""
        return max(0, self.peak_bytes - self.start_bytes)


@contextlib.contextmanager
def watched_peak(accelerator: MeasuresAccelerator) -> Iterator[MemoryPeak]:
    """Count this program's peak while the context is open; it is set when that closes.

    Raises:
        ConfigError: this system has no ``/proc``.
    """
    accelerator.restart_memory_peak()
    trim()
    with _host_peak() as host:
        peak = MemoryPeak(total_bytes(accelerator), 0)
        yield peak
    used = accelerator.accelerator_memory()
    if used is None:
        peak.peak_bytes = host.peak_bytes
    else:
        peak.peak_bytes = used.peak_bytes + used.runtime_bytes
        peak.peak_bytes += 0 if used.is_own else host.peak_bytes


def total_bytes(accelerator: MeasuresAccelerator) -> int:
    """Return what this program takes now, as in `MemoryPeak`.

    Raises:
        ConfigError: this system has no ``/proc``.
    """
    used = accelerator.accelerator_memory()
    if used is None:
        return resident_bytes()
    total = used.used_bytes + used.runtime_bytes
    return total if used.is_own else total + resident_bytes()


def resident_bytes() -> int:
    """Return what this process holds of the machine's memory now.

    Raises:
        ConfigError: this system has no ``/proc``.
    """
    return _status("VmRSS")


def resident_peak_bytes() -> int:
    """Return the most that this process held since `forget_peak`.

    Raises:
        ConfigError: this system has no ``/proc``.
    """
    return _status("VmHWM")


def forget_peak() -> bool:
    """Let the kernel count the process's peak anew; False where it does not allow that."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def trim() -> None:
    """Collect garbage, and give freed memory back to the system where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # musl and others have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _host_peak() -> Iterator[MemoryPeak]:
    before = resident_bytes()
    peak = MemoryPeak(before, before)
    if forget_peak():
        yield peak
        peak.peak_bytes = resident_peak_bytes()
        return
    with _Sampler() as sampler:
        yield peak
    peak.peak_bytes = max(sampler.peak_bytes, resident_bytes())


class _Sampler:
    """A thread that looks how much memory the process has, until the context closes."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="memory-sampler")

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            if self._stop.wait(SAMPLE_EVERY_S):
                return


def _status(key: str) -> int:
    try:
        found = dict(_LINE.findall(_STATUS.read_text()))
        return int(found[key]) * 1024
    except (OSError, KeyError) as error:
        raise ConfigError(
            f"memory cannot be measured here: {_STATUS} does not say {key}, which needs Linux"
        ) from error
