"""The machine's memory and this process's part of it: /proc/meminfo under the cgroups' limits."""

from __future__ import annotations

from edge_agent.sensors import cgroups
from edge_agent.sensors.kernel_files import KernelFiles, integer

_MOST_BYTES = 2**50
"""A pebibyte; what says more is no machine."""
_KIB = 1024


def total_bytes(files: KernelFiles) -> int | None:
    """Return the machine's memory, or the container's limit where that is smaller."""
    return _smallest(_meminfo_bytes(files, "MemTotal"), cgroups.memory_limit_bytes(files))


def available_bytes(files: KernelFiles) -> int | None:
    """Return what this process could take beside what it has, without pushing others out."""
    free = _meminfo_bytes(files, "MemAvailable")
    if free is None:  # before Linux 3.14
        parts = [_meminfo_bytes(files, name) for name in ("MemFree", "Buffers", "Cached")]
        known = [part for part in parts if part is not None]
        free = sum(known) if len(known) == len(parts) else None
    return _smallest(free, cgroups.memory_headroom_bytes(files))


def machine_available_bytes(files: KernelFiles) -> int | None:
    """Return what the machine's memory has left for all, whatever this process may take of it.

    No cgroup counts what a GPU takes of it, so a container's limit would hide that.
    """
    return _meminfo_bytes(files, "MemAvailable")


def resident_bytes(files: KernelFiles) -> int | None:
    """Return what this process holds of memory, its libraries and mapped files included."""
    return _status_bytes(files, "VmRSS")


def own_bytes(files: KernelFiles) -> int:
    """Return what would be free if this process were not, beside what is free already.

    Without mapped files: the kernel counts what it has of files as available, whoever reads
    them. 0 where nothing says. A Jetson's GPU memory is not in it; that no file of the kernel
    tells to all users.
    """
    parts = [_status_bytes(files, name) for name in ("RssAnon", "RssShmem")]
    return sum(part for part in parts if part is not None)


def _meminfo_bytes(files: KernelFiles, key: str) -> int | None:
    return _table_bytes(files, "proc/meminfo", key)


def _status_bytes(files: KernelFiles, key: str) -> int | None:
    return _table_bytes(files, "proc/self/status", key)


def _table_bytes(files: KernelFiles, path: str, key: str) -> int | None:
    kibibytes = integer(files.table(path).get(key, "").removesuffix("kB"))
    if kibibytes is None or not 0 <= kibibytes * _KIB <= _MOST_BYTES:
        return None
    return kibibytes * _KIB


def _smallest(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
