"""The most memory that this process took, from the kernel's own books."""

from __future__ import annotations

import re
from pathlib import Path

from shared.memory_use import resident_bytes

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc_pid_clear_refs
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def forget_peak() -> bool:
    """Let `peak_bytes` begin anew; False where the kernel does not allow that."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the most resident memory since the last `forget_peak`.

    Raises:
        ConfigError: this system does not tell what memory a process has.
    """
    now = resident_bytes()
    found = _PEAK.search(_STATUS.read_text())
    return max(now, int(found[1]) * 1024) if found else now
