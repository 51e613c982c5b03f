"""Tells the owner of a device whether there is a coordinator at the broker to talk to."""

from __future__ import annotations

import json
import logging
from typing import NamedTuple

from shared.clock import Clock

logger = logging.getLogger(__name__)

SILENCE_S = 5.0
"""A status that is retained comes with the subscription: after this long there is none."""


class Seen(NamedTuple):
    """What the coordinator said of itself: ``online``, ``offline`` or ``finished``, and its run."""

    state: str
    run_id: str


class CoordinatorWatch:
    """Logs each change of the coordinator's state once. Belongs to the owner's thread."""

    def __init__(self, clock: Clock) -> None:
        """Begin to wait for a first sign."""
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._seen: Seen | None = None
        self._waits_for_first_sign = True

    def status(self, payload: bytes) -> Seen | None:
        """Take a status of the coordinator and return it; None if it is unreadable."""
        try:
            status = json.loads(payload)
            seen = Seen(str(status["state"]), str(status["run_id"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.debug("unreadable status of the coordinator")
            return None
        self.heard()
        if seen != self._seen:
            self._tell(seen)
        self._seen = seen
        return seen

    def _tell(self, seen: Seen) -> None:
        if seen.state == "online":
            logger.info("the coordinator is online (run %.64s)", seen.run_id)
        elif seen.state == "finished":
            logger.info("run %.64s is complete", seen.run_id)
        else:
            logger.warning("the coordinator is offline, waiting for it")

    def heard(self) -> None:
        """Note a sign of the coordinator, whatever it was."""
        self._waits_for_first_sign = False

    def tick(self) -> None:
        """Say once that nobody is there, where no sign came in the first seconds."""
        waited_s = self._clock.monotonic_s() - self._started_s
        if self._waits_for_first_sign and waited_s >= SILENCE_S:
            self._waits_for_first_sign = False
            logger.info("no coordinator at this broker yet, waiting")
