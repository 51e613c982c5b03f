"""The CPUs: how many of them this process may use, and how busy they are."""

from __future__ import annotations

import re
import threading

from edge_agent.sensors import cgroups
from edge_agent.sensors.kernel_files import KernelFiles, integer, within

_MOST_CPUS = 8192
_IDLE = (3, 4)
"""Fields idle and iowait of a line of /proc/stat; guest times (8 on) are in user time already."""
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)


def cpus(files: KernelFiles) -> float | None:
    """Return how many CPUs' time this process may use: affinity, CPUs online, cgroup quota."""
    allowed = _cpu_set(files.table("proc/self/status").get("Cpus_allowed_list"))
    # A Jetson's power mode takes CPUs offline, and the affinity keeps naming them.
    online = _cpu_set(files.text("sys/devices/system/cpu/online"))
    usable = allowed & online if allowed and online else allowed or online
    counts = [float(len(usable)) if usable else None, cgroups.cpu_limit(files)]
    return min((count for count in counts if count is not None), default=None)


class CpuLoad:
    """How busy the machine's CPUs were since the last look. Any thread."""

    def __init__(self, files: KernelFiles) -> None:
        """Begin to count."""
        self._files = files
        self._lock = threading.Lock()
        self._before = _busy_and_total(files)

    def percent(self) -> float | None:
        """Return the load since the last call, 0 to 100; None: nothing says, or no time passed."""
        now = _busy_and_total(self._files)
        with self._lock:
            before, self._before = self._before, now
        if before is None or now is None or now[1] <= before[1]:
            return None
        return within(100 * (now[0] - before[0]) / (now[1] - before[1]), low=0, high=100)


def _busy_and_total(files: KernelFiles) -> tuple[int, int] | None:
    words = (files.text("proc/stat") or "").partition("\n")[0].split()
    ticks = [integer(word) for word in words[1:9]]
    known = [tick for tick in ticks if tick is not None and tick >= 0]
    if words[:1] != ["cpu"] or len(ticks) <= max(_IDLE) or len(known) < len(ticks):
        return None
    return sum(known) - sum(known[index] for index in _IDLE), sum(known)


def _cpu_set(text: str | None) -> frozenset[int]:
    """Return the CPUs of a list such as "0-3,6"; none where it is no such list."""
    found: set[int] = set()
    for part in (text or "").strip().split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            return frozenset()
        first, last = int(match[1]), int(match[2] or match[1])
        found.update(range(first, min(last, _MOST_CPUS) + 1))
    return frozenset(found)
