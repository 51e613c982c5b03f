"""Where paho's threads leave what happened, for the owner's thread to pick up."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Generic, TypeVar

from shared.transport.base import Delivery

logger = logging.getLogger(__name__)

MAX_BYTES = 256 * 2**20
MAX_DELIVERIES = 20_000

Notice = TypeVar("Notice")


class Inbox(Generic[Notice]):
    """A queue of deliveries, bounded in bytes and in number, and of notices about the link.

    Any thread may call any method. Nothing here ever waits but `take`. When the bound is
    reached the newest delivery is dropped and counted: the writer is a network thread, which
    must not wait or keepalive stops, and the protocol repeats what was not answered. Notices
    are never dropped; there are a few for each connection that comes or goes.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_deliveries: int = MAX_DELIVERIES) -> None:
        """Take the bounds: payload bytes and number of deliveries waiting."""
        self._max_bytes = max_bytes
        self._max_deliveries = max_deliveries
        self._items: deque[Delivery | Notice] = deque()
        self._bytes = 0
        self._deliveries = 0
        self._dropped = 0
        # Entered as itself and not as the condition: that is entered in Python code, in which a
        # signal may raise once the lock is held, and nobody would ever let go of it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def dropped(self) -> int:
        """Deliveries that found the queue full."""
        return self._dropped

    def push(self, notice: Notice) -> None:
        """Add a notice about the link."""
        with self._lock:
            self._items.append(notice)
            self._changed.notify()

    def offer(self, delivery: Delivery) -> bool:
        """Add a delivery and return True, or drop it and return False where the queue is full."""
        size = len(delivery.payload)
        with self._lock:
            if self._bytes + size > self._max_bytes or self._deliveries >= self._max_deliveries:
                self._dropped += 1
                dropped, waiting, held = self._dropped, self._deliveries, self._bytes
            else:
                self._items.append(delivery)
                self._bytes += size
                self._deliveries += 1
                self._changed.notify()
                return True
        if dropped & (dropped - 1) == 0:  # the 1st, 2nd, 4th, 8th: a flood fills no log
            logger.warning(
                "dropped an arriving payload on %s (%s dropped so far): %s payloads of %s bytes "
                "wait to be read; this program is slower than what is sent to it",
                delivery.topic,
                dropped,
                waiting,
                held,
            )
        return False

    def take(self, timeout_s: float) -> Delivery | Notice | None:
        """Return the oldest item, waiting up to ``timeout_s`` seconds for one; None if none."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while not self._items:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._changed.wait(remaining):
                    if not self._items:
                        return None
                    break
            item = self._items.popleft()
            if isinstance(item, Delivery):
                self._bytes -= len(item.payload)
                self._deliveries -= 1
            return item
