"""Time as the coordinator saw it: what it slept through or could not hear is nobody's silence."""

from __future__ import annotations

from typing import Final

from shared.clock import Clock

LONGEST_GAP_S: Final = 2.0
TICK_S: Final = 1.0
DOUBT_AFTER_S: Final = 4.0
"""Two heartbeats of an agent."""
DOUBT_UNTIL_S: Final = 25.0
"""By then a connection that carries nothing was found out by its keep-alive of 10 s."""


class AttendedClock:
    """A clock that goes on for at most `LONGEST_GAP_S` between two looks.

    Whoever was stopped, or computed for long, has not heard what others said meanwhile, so that
    time says nothing about them.
    """

    def __init__(self, clock: Clock) -> None:
        """Start at the time of ``clock``."""
        self._clock = clock
        self._looked_s = clock.monotonic_s()
        self._unattended_s = 0.0

    def look(self) -> None:
        """Note that the owner looks at what arrived, now."""
        now_s = self._clock.monotonic_s()
        self._unattended_s += self._beyond_s(now_s)
        self._looked_s = now_s

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start, never going back, without those of long gaps."""
        now_s = self._clock.monotonic_s()
        return now_s - self._unattended_s - self._beyond_s(now_s)

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return self._clock.wall_s()

    def _beyond_s(self, now_s: float) -> float:
        return max(0.0, now_s - self._looked_s - LONGEST_GAP_S)


class Watch:
    """Says when to look who is silent or late, and how much time counts against them.

    None counts while the link is down, nor while nothing at all arrives although no device said
    that it left: then our own link is the likelier cause, until its keep-alive clears that up.
    """

    def __init__(self, clock: Clock) -> None:
        """Start with a link that is up; ``clock``: an attended one."""
        self._clock = clock
        self._ticked_s = self._arrived_s = clock.monotonic_s()
        self.link_is_up = True

    def arrived(self) -> None:
        """Note that something came over the link."""
        self._arrived_s = self._clock.monotonic_s()

    @property
    def idle_s(self) -> float:
        """How long until the next look, in seconds."""
        return self._ticked_s + TICK_S - self._clock.monotonic_s()

    def passed_s(self) -> float | None:
        """Return the seconds since the last look that count; None while it is not yet time."""
        now_s = self._clock.monotonic_s()
        if now_s < self._ticked_s + TICK_S:
            return None
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        in_doubt = DOUBT_AFTER_S <= now_s - self._arrived_s < DOUBT_UNTIL_S
        return passed_s if self.link_is_up and not in_doubt else None
