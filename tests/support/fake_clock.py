"""A clock that stands still until a test moves it."""

from __future__ import annotations


class FakeClock:
    """A `shared.clock.Clock` that starts at 1000 s and moves only by `advance`."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s

    def monotonic_s(self) -> float:
        """Return the seconds of this clock."""
        return self._now_s

    def wall_s(self) -> float:
        """Return the same seconds, as if they had been counted from 1970."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds``, which may be 0 but not less."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        self._now_s += seconds

    def advance_to(self, time_s: float) -> None:
        """Move forward to ``time_s``; stay where it has passed already."""
        self._now_s = max(self._now_s, time_s)
