"""A broker and its clients inside one process, moved by a clock: for tests and the testbed.

It keeps what MQTT promises (exact and ``+`` filters, retained messages, wills, order on one
connection) and loses, delays, doubles and reorders what its `Faults` say. Nothing here sleeps
or waits: a driver moves the clock to `MemoryBroker.next_due_s` when nobody has work.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.clock import Clock
from shared.errors import BrokerUnreachableError
from shared.protocol.tensors import Buffer
from shared.protocol.topics import Filter, Topic
from shared.transport.base import Delivery, LinkDown, LinkUp, TransportEvent, Will, check_size

DEFAULT_MAX_PAYLOAD_BYTES = 999_488
"""As a real broker leaves us: 1,000,000 less the packet's header."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """One payload on its way to one client."""

    topic: str
    payload: bytes
    sender: str
    receiver: str

    @property
    def kind(self) -> str:
        """The last part of the topic: ``activations``, ``status`` and so on."""
        return self.topic.rsplit("/", 1)[-1]


class Faults(Protocol):
    """What goes wrong on the way."""

    def delays_s(self, parcel: Parcel) -> Sequence[float]:
        """Return after how many seconds each copy arrives: () loses it, (0, 0) doubles it.

        Copies that are due at one time arrive in the order they were sent.
        """


class NoFaults:
    """Everything arrives, once and at once."""

    def delays_s(self, parcel: Parcel) -> Sequence[float]:
        """Return a single copy without delay."""
        return (0.0,)


class MemoryBroker:
    """Routes between `MemoryTransport` objects; any thread may call anything.

    With one thread and a seeded `Faults` every run is the same. ``traffic`` lists every
    (topic, payload) that was published, births and wills included, in order; nothing without
    ``keeps_traffic``, as long runs would fill the memory with it.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        faults: Faults | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        keeps_traffic: bool = True,
    ) -> None:
        """Start empty: no client, nothing retained."""
        self._keeps_traffic = keeps_traffic
        self.max_payload_bytes = max_payload_bytes
        self.faults: Faults = faults if faults is not None else NoFaults()
        self.traffic: list[tuple[str, bytes]] = []
        self.is_running = True
        self._clock = clock
        self._clients: dict[str, MemoryTransport] = {}
        self._retained: dict[str, tuple[bytes, str]] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def next_due_s(self) -> float | None:
        """Return when (on the clock) the next event is due at any client; None when none is."""
        with self._lock:
            due = [client.next_due_s() for client in self._clients.values()]
            return min((time_s for time_s in due if time_s is not None), default=None)

    def stop(self) -> None:
        """Go down as when killed: links break, what was under way or retained is gone."""
        with self._lock:
            self.is_running = False
            self._retained.clear()
            for client in list(self._clients.values()):
                client.link_broke("the broker stopped")

    def restart(self) -> None:
        """Come up again, empty; every client reconnects, subscribes and is born again."""
        with self._lock:
            self.is_running = True
            for client in list(self._clients.values()):
                client.reconnect()

    # --- for MemoryTransport -----------------------------------------------------------------

    def attach(self, client: MemoryTransport) -> None:
        """Take in a client that starts.

        Raises:
            BrokerUnreachableError: the broker is stopped.
        """
        with self._lock:
            if not self.is_running:
                raise BrokerUnreachableError("the memory broker is stopped: call restart() first")
            self._clients[client.name] = client

    def detach(self, client: MemoryTransport) -> None:
        """Forget a client that closed or vanished."""
        with self._lock:
            self._clients.pop(client.name, None)

    def subscribed(self, client: MemoryTransport) -> None:
        """Send a client that (re)subscribed what is retained on its topics."""
        with self._lock:
            for topic, (payload, sender) in self._retained.items():
                self._send(Parcel(topic, payload, sender, client.name))

    def publish(self, topic: Topic, payload: bytes, *, sender: str) -> None:
        """Pass one payload to everyone who subscribed to its topic."""
        with self._lock:
            if self._keeps_traffic:
                self.traffic.append((topic.name, payload))
            if topic.retain and payload:
                self._retained[topic.name] = (payload, sender)
            elif topic.retain:
                self._retained.pop(topic.name, None)
            for name in list(self._clients):
                self._send(Parcel(topic.name, payload, sender, name))

    def now_s(self) -> float:
        """Return the time on the broker's clock."""
        return self._clock.monotonic_s()

    def number(self) -> int:
        """Return the next number of a sequence: it keeps apart what is due at one time."""
        return next(self._numbers)

    def _send(self, parcel: Parcel) -> None:
        client = self._clients[parcel.receiver]
        if not client.wants(parcel.topic):
            return
        for delay_s in self.faults.delays_s(parcel):
            client.schedule(Delivery(parcel.topic, parcel.payload), delay_s=delay_s)


class MemoryTransport:
    """A `Transport` at a `MemoryBroker`; ``name`` must be its only one there.

    `receive` never waits: it returns what is due at the clock's time, or None.
    """

    def __init__(self, broker: MemoryBroker, *, name: str, will: Will | None = None) -> None:
        """Make an unconnected transport."""
        self.name = name
        self._broker = broker
        self._will = will
        self._filters: tuple[Filter, ...] = ()
        self._due: list[tuple[float, int, TransportEvent]] = []
        self._is_up = False
        self._is_gone = False
        self._bytes_sent = 0
        self._bytes_received = 0

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that may be published."""
        return self._broker.max_payload_bytes

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed to the broker since the start."""
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes that `receive` gave out since the start."""
        return self._bytes_received

    def start(self, filters: Sequence[Filter], *, timeout_s: float) -> None:
        """Connect, subscribe and publish the birth, without waiting for anything.

        Raises:
            BrokerUnreachableError: the broker is stopped.
        """
        self._filters = tuple(filters)
        self._broker.attach(self)
        self._connect()

    def publish(self, topic: Topic, payload: Buffer) -> None:
        """Hand over one payload; it is dropped while the link is down.

        Raises:
            PacketLimitError: the payload is larger than `max_payload_bytes`.
        """
        data = bytes(payload)
        check_size(topic, len(data), self)
        if self._is_up:
            self._bytes_sent += len(data)
            self._broker.publish(topic, data, sender=self.name)

    def flush(self, timeout_s: float) -> bool:
        """Say that the broker has everything: a publish here is a call of it."""
        return self._is_up

    def receive(self, timeout_s: float) -> TransportEvent | None:
        """Return the next event that is due now; None, at once, if there is none."""
        if not self._due or self._due[0][0] > self._broker.now_s():
            return None
        _, _, event = heapq.heappop(self._due)
        if isinstance(event, Delivery):
            self._bytes_received += len(event.payload)
        return event

    def close(self, last_word: bytes | None = None) -> None:
        """Publish the death notice, or ``last_word``, and disconnect. May be called twice."""
        self._leave(last_word)

    # --- what tests do to a client ------------------------------------------------------------

    def vanish(self) -> None:
        """Die as a killed process does: the broker publishes the will; nothing arrives again."""
        self._leave()

    def lose_link(self, reason: str = "the link was cut") -> None:
        """Break this client's connection alone: the broker publishes its will."""
        if self._is_up:
            self.link_broke(reason)
            self._publish_death()

    def reconnect(self) -> None:
        """Connect, subscribe and be born again, after `lose_link` or a broker restart."""
        if not self._is_up and not self._is_gone and self._broker.is_running:
            self._connect()

    # --- for MemoryBroker ---------------------------------------------------------------------

    def wants(self, topic: str) -> bool:
        """Tell whether the client is connected and subscribed to this topic."""
        return self._is_up and any(matches(one.pattern, topic) for one in self._filters)

    def schedule(self, event: TransportEvent, *, delay_s: float = 0.0) -> None:
        """Let `receive` return this event ``delay_s`` seconds from now."""
        due_s = self._broker.now_s() + delay_s
        heapq.heappush(self._due, (due_s, self._broker.number(), event))

    def next_due_s(self) -> float | None:
        """Return when the next event is due; None when none is."""
        return self._due[0][0] if self._due else None

    def link_broke(self, reason: str) -> None:
        """Lose the link: what is due has arrived, what is still under way never will."""
        if self._is_up:
            self._is_up = False
            now_s = self._broker.now_s()
            self._due = [entry for entry in self._due if entry[0] <= now_s]
            heapq.heapify(self._due)
            self.schedule(LinkDown(reason))

    def _connect(self) -> None:
        self._is_up = True
        self.schedule(LinkUp())
        self._broker.subscribed(self)
        if self._will is not None:
            self._broker.publish(self._will.topic, self._will.birth, sender=self.name)

    def _leave(self, last_word: bytes | None = None) -> None:
        was_up, self._is_up, self._is_gone = self._is_up, False, True
        self._due.clear()
        self._broker.detach(self)
        if was_up:
            self._publish_death(last_word)

    def _publish_death(self, last_word: bytes | None = None) -> None:
        if self._will is not None:
            word = last_word or self._will.death
            self._broker.publish(self._will.topic, word, sender=self.name)


def matches(pattern: str, topic: str) -> bool:
    """Tell whether an MQTT filter, with ``+`` for one level, takes in a topic.

    ``#`` is not known here: no filter of ours has one.
    """
    wanted, levels = pattern.split("/"), topic.split("/")
    return len(wanted) == len(levels) and all(
        one in ("+", level) for one, level in zip(wanted, levels, strict=True)
    )
