"""A clock of this process's own work: whoever else uses the processors, it goes no faster."""

from __future__ import annotations

import time


class CpuClock:
    """A `shared.clock.Clock` that counts the processor time of this process."""

    def monotonic_s(self) -> float:
        """Return processor seconds."""
        return time.process_time()

    def wall_s(self) -> float:
        """Return seconds since 1970."""
        return time.time()
