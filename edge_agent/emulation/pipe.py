"""One direction of a slow link, as due times that follow from arrival times; no clock, no thread.

A `Pipe` sends one packet after the other at its rate, and each arrives its latency later. What
is urgent goes first, even before the rest of a packet that is half sent: on a real link small
packets of one connection slip between the many small ones that a large packet of another is
made of. So control traffic takes bandwidth from data and never waits for it.

All times are seconds on one clock that never goes back; a call with an earlier time than the
one before is taken to come at that one's.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class _Packet(Generic[Item]):
    """What is not wholly sent yet; ``left`` in bytes."""

    owner: int
    item: Item
    left: float


@dataclass(slots=True, order=True)
class _Arrival(Generic[Item]):
    due_s: float
    number: int
    item: Item = field(compare=False)


class Pipe(Generic[Item]):
    """Packets of several owners (the connections of one device) that share one rate.

    ``bytes_per_s`` None: as fast as asked. Not thread-safe.
    """

    def __init__(self, *, bytes_per_s: float | None, latency_s: float) -> None:
        """Make an empty pipe."""
        self._bytes_per_s = math.inf if bytes_per_s is None else bytes_per_s
        self._latency_s = latency_s
        self._sent_until_s = -math.inf
        # The packets not wholly sent: urgent ones before the others, each in order.
        self._urgent: deque[_Packet[Item]] = deque()
        self._patient: deque[_Packet[Item]] = deque()
        self._arriving: dict[int, list[_Arrival[Item]]] = {}
        self._numbers = itertools.count()

    def put(
        self, item: Item, size: int, *, now_s: float, owner: int = 0, urgent: bool = False
    ) -> None:
        """Take in a packet of ``size`` bytes."""
        self._send_until(now_s)
        queue = self._urgent if urgent else self._patient
        queue.append(_Packet(owner, item, float(size)))

    def put_last(self, item: Item, *, now_s: float, owner: int = 0) -> None:
        """Take in something without size or latency that keeps its place among the rest.

        It arrives at once, but after all that ``owner`` has in the pipe; what is put later
        arrives later.
        """
        self._send_until(now_s)
        self._send_until(math.inf)
        due_s = max((one.due_s for one in self._arriving.get(owner, ())), default=now_s)
        self._arrives(owner, item, max(due_s, now_s))

    def take(self, *, now_s: float, owner: int = 0) -> Item | None:
        """Return what has arrived for ``owner`` first; None where nothing has yet."""
        self._send_until(now_s)
        arrivals = self._arriving.get(owner)
        if not arrivals or arrivals[0].due_s > now_s:
            return None
        return heapq.heappop(arrivals).item

    def next_due_s(self, *, owner: int = 0) -> float | None:
        """Return when to look again for ``owner``, if nothing else is put; None: never.

        Something has arrived by then, or else a packet of another owner has been sent.
        """
        arrivals = self._arriving.get(owner)
        due_s = arrivals[0].due_s if arrivals else math.inf
        if any(packet.owner == owner for packet in (*self._urgent, *self._patient)):
            first = (self._urgent or self._patient)[0]
            sent_s = self._sent_until_s + first.left / self._bytes_per_s
            due_s = min(due_s, sent_s + self._latency_s)
        return due_s if due_s < math.inf else None

    def forget(self, owner: int) -> int:
        """Drop all that ``owner`` has in the pipe; return how much that was."""
        dropped = len(self._arriving.pop(owner, ()))
        for queue in (self._urgent, self._patient):
            kept = [packet for packet in queue if packet.owner != owner]
            dropped += len(queue) - len(kept)
            queue.clear()
            queue.extend(kept)
        return dropped

    def _send_until(self, now_s: float) -> None:
        """Send what can be sent before ``now_s``; infinity: all of it."""
        while self._urgent or self._patient:
            queue = self._urgent or self._patient
            packet = queue[0]
            sent_s = self._sent_until_s + packet.left / self._bytes_per_s
            if sent_s > now_s:
                if now_s > self._sent_until_s:
                    packet.left -= (now_s - self._sent_until_s) * self._bytes_per_s
                break
            queue.popleft()
            self._sent_until_s = sent_s
            self._arrives(packet.owner, packet.item, sent_s + self._latency_s)
        if now_s < math.inf:
            self._sent_until_s = max(self._sent_until_s, now_s)

    def _arrives(self, owner: int, item: Item, due_s: float) -> None:
        arrival = _Arrival(due_s, next(self._numbers), item)
        heapq.heappush(self._arriving.setdefault(owner, []), arrival)
