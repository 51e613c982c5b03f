"""Tells the owner of a device whether there is a coordinator at the broker to talk to."""

from __future__ import annotations

import json
import logging

from shared.clock import Clock

logger = logging.getLogger(__name__)

SILENCE_S = 5.0
"""A status that is retained comes with the subscription: after this long there is none."""


class CoordinatorWatch:
    """Logs each change of the coordinator's state once. Belongs to the owner's thread."""

    def __init__(self, clock: Clock) -> None:
        """Begin to wait for a first sign."""
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._seen: tuple[str, str] | None = None
        self._waits_for_first_sign = True

    def status(self, payload: bytes) -> bool:
        """Take a status of the coordinator, unless it is unreadable; tell whether it is online."""
        try:
            status = json.loads(payload)
            seen = str(status["state"]), str(status["run_id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.debug("unreadable status of the coordinator")
            return False
        self.heard()
        state, run_id = seen
        if seen == self._seen:
            return state == "online"
        self._seen = seen
        if state == "online":
            logger.info("the coordinator is online (run %.64s)", run_id)
        else:
            logger.warning("the coordinator is offline, waiting for it")
        return state == "online"

    def heard(self) -> None:
        """Note a sign of the coordinator, whatever it was."""
        self._waits_for_first_sign = False

    def tick(self) -> None:
        """Say once that nobody is there, where no sign came in the first seconds."""
        waited_s = self._clock.monotonic_s() - self._started_s
        if self._waits_for_first_sign and waited_s >= SILENCE_S:
            self._waits_for_first_sign = False
            logger.info("no coordinator at this broker yet, waiting")
