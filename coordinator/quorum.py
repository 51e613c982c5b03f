"""When a round may start, and when nobody can be waited for any longer. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from coordinator.settings import DeviceRules
from shared.errors import QuorumError


class Verdict(enum.Enum):
    """What to do now."""

    START = "start"
    WAIT = "wait"
    GIVE_UP = "give up"


class Quorum:
    """Remembers since when devices were ready, or since when none was."""

    def __init__(self, rules: DeviceRules, now_s: float) -> None:
        """Begin to wait."""
        self._rules = rules
        self._idle_since_s = now_s
        self._enough_since_s: float | None = None
        self._first = True

    def reset(self, now_s: float) -> None:
        """Begin to wait anew: a round is over, or the link was."""
        self._idle_since_s = now_s
        self._enough_since_s = None

    def bear(self, now_s: float) -> None:
        """Count no time until now: devices wait for something of ours."""
        self._idle_since_s = now_s

    def too_few(self, ready: int, *, least: int) -> QuorumError:
        """Return the error that giving up is."""
        return QuorumError(
            f"{ready} of at least {least} devices were ready within "
            f"{self._rules.join_timeout_s:.0f} s: start more agents, or lower devices.min"
        )

    def judge(
        self, ready: int, *, on_their_way: Sequence[float], least: int, now_s: float
    ) -> Verdict:
        """Return what to do with ``ready`` devices where ``least`` must be.

        ``on_their_way``: when each device that still prepares last asked for something; while
        they do, nobody gives up. Only the first round waits for the expected number.
        """
        rules = self._rules
        if ready < least:
            self._enough_since_s = None
            last_sign_s = max([self._idle_since_s, *on_their_way])
            over = now_s - last_sign_s > rules.join_timeout_s
            return Verdict.GIVE_UP if over else Verdict.WAIT
        if self._enough_since_s is None:
            self._enough_since_s = now_s
        waited_s = now_s - self._enough_since_s
        if self._first and ready < (rules.expected or rules.min) and waited_s < rules.wait_s:
            return Verdict.WAIT
        self._first = False
        return Verdict.START
