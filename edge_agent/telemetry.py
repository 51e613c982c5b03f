"""How the device is, for its heartbeats: a reading of its sensors when one is due."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from shared.clock import Clock
from shared.protocol.profile import Telemetry

logger = logging.getLogger(__name__)

TELEMETRY_EVERY_S = 10.0


class PacedTelemetry:
    """Reads at most once in `TELEMETRY_EVERY_S`. Any thread may ask; none waits for another.

    So a sensor that hangs or fails takes its reading with it, and no heartbeat.
    """

    def __init__(self, read: Callable[[], Telemetry], clock: Clock) -> None:
        """Take readings from ``read``, the first when first asked."""
        self._read = read
        self._clock = clock
        self._reading = threading.Lock()
        self._next_s = clock.monotonic_s()
        self._warned = False

    def due(self) -> Telemetry | None:
        """Return a new reading; None: none is due, another thread takes it, or it failed."""
        if not self._reading.acquire(blocking=False):
            return None
        try:
            now = self._clock.monotonic_s()
            if now < self._next_s:
                return None
            self._next_s = now + TELEMETRY_EVERY_S
            return self._read()
        except Exception as error:  # noqa: BLE001 - kernel and driver may do anything
            if not self._warned:
                self._warned = True
                logger.warning("no telemetry: reading the sensors failed (%r)", error)
            return None
        finally:
            self._reading.release()
