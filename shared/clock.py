"""Time as an argument: programs take a `Clock`, tests hand in one that they move by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a program gets the time from."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start, never going back: for timeouts and durations."""

    def wall_s(self) -> float:
        """Seconds since 1970: for what people read."""


class SystemClock:
    """The machine's own clock."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start, never going back."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return time.time()
