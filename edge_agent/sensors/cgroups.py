"""What the control groups that this process is in leave it: memory and CPU time.

In a container these are the truth, not /proc/meminfo. Groups are nested and each has a limit of
its own, so the tightest on the way up counts. Version 2 is one hierarchy; version 1 has
one for memory and one for CPU time. Inside a container either may be mounted such that the
process's own group is the root, so a path that is not there is no error.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_agent.sensors.kernel_files import KernelFiles, integer, within

_MOUNT = "sys/fs/cgroup"
_DEEPEST = 32
_MOST_BYTES = 2**62
"""Version 1 says "no limit" as 2**63 less a page."""


def memory_limit_bytes(files: KernelFiles) -> int | None:
    """Return the tightest memory limit on this process; None: there is none."""
    return min((limit for _, limit in _limited(files)), default=None)


def memory_headroom_bytes(files: KernelFiles) -> int | None:
    """Return how much more this process may take before it meets a limit; None: there is none.

    A group's use counts what is cached of files too, and that the kernel gives back first.
    """
    rooms = [
        limit - max(0, use - _reclaimable_bytes(files, group))
        for group, limit in _limited(files)
        if (use := _use_bytes(files, group)) is not None
    ]
    return max(0, min(rooms)) if rooms else None


def cpu_limit(files: KernelFiles) -> float | None:
    """Return how many CPUs' time this process may use; None: there is no limit."""
    quotas = [_quota_v2(files, group) for group in _groups(files, "", "", "unified")]
    quotas += [_quota_v1(files, group) for group in _groups(files, "cpu", "cpu", "cpu,cpuacct")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _limited(files: KernelFiles) -> Iterator[tuple[str, int]]:
    """Yield the groups that limit memory, with their limits: those of any kind."""
    for group in _groups(files, "", "", "unified"):
        # Past `high` the kernel slows a program down until it would rather have died.
        for name in ("memory.max", "memory.high"):
            yield from _limit(files, group, name)
    for group in _groups(files, "memory", "memory"):
        yield from _limit(files, group, "memory.limit_in_bytes")


def _limit(files: KernelFiles, group: str, name: str) -> Iterator[tuple[str, int]]:
    limit = files.number(f"{group}/{name}")
    if limit is not None and 0 < limit < _MOST_BYTES:
        yield group, limit


def _use_bytes(files: KernelFiles, group: str) -> int | None:
    for name in ("memory.current", "memory.usage_in_bytes"):
        use = files.number(f"{group}/{name}")
        if use is not None and 0 <= use < _MOST_BYTES:
            return use
    return None


def _reclaimable_bytes(files: KernelFiles, group: str) -> int:
    table = files.table(f"{group}/memory.stat")
    total = 0
    for name in ("inactive_file", "active_file"):
        # Version 1 says it of the group alone, and of all below it with this prefix.
        value = integer(table.get(f"total_{name}", table.get(name)))
        total += value if value is not None and 0 <= value < _MOST_BYTES else 0
    return total


def _quota_v2(files: KernelFiles, group: str) -> float | None:
    quota, _, period = (files.text(f"{group}/cpu.max") or "").strip().partition(" ")
    return _cpus(integer(quota), integer(period))


def _quota_v1(files: KernelFiles, group: str) -> float | None:
    quota = files.number(f"{group}/cpu.cfs_quota_us")
    return _cpus(quota, files.number(f"{group}/cpu.cfs_period_us"))


def _cpus(quota_us: int | None, period_us: int | None) -> float | None:
    if quota_us is None or period_us is None or quota_us <= 0 or period_us <= 0:
        return None
    return within(quota_us / period_us, low=1e-3, high=1e5)


def _groups(files: KernelFiles, controller: str, *mounts: str) -> Iterator[str]:
    """Yield the folders of this process's group and of those around it, innermost first.

    ``controller`` "": the one hierarchy of version 2.
    """
    parts = _own_group(files, controller)
    for mount in mounts:
        for depth in range(len(parts), -1, -1):
            yield "/".join(filter(None, [_MOUNT, mount, *parts[:depth]]))


def _own_group(files: KernelFiles, controller: str) -> list[str]:
    for line in (files.text("proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            # ".." stands there where a process was moved in from outside: that cannot be seen.
            return [part for part in path.split("/") if part not in ("", ".", "..")][:_DEEPEST]
    return []
