"""A slower link than the machine's: what a transport sends and receives takes its time.

Payload bytes count, not headers. The broker's acknowledgements, the connection's handshake and
its pings are not slowed.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from edge_agent.emulation.pipe import Pipe
from edge_agent.emulation.spec import Emulation
from shared.errors import HsplitError
from shared.protocol.tensors import Buffer
from shared.protocol.topics import Filter, Topic
from shared.transport.base import (
    Delivery,
    LinkDown,
    LinkUp,
    Transport,
    TransportEvent,
    check_size,
)
from shared.transport.memory import matches

logger = logging.getLogger(__name__)

POLL_S = 0.1
CLOSE_TIMEOUT_S = 2.0
MAX_HELD_BYTES = 256 * 2**20
"""What may be on its way down; the rest waits in the inner transport, as at a broker."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Outgoing:
    topic: Topic
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Failed:
    error: HsplitError


class _Stop:
    """Ends the thread that takes it."""


_Sent: TypeAlias = _Outgoing | _Stop
_Came: TypeAlias = TransportEvent | _Failed


class _Way(Generic[Item]):
    """A `Pipe` between threads: any of them may call anything."""

    def __init__(self, bytes_per_s: float | None, latency_s: float) -> None:
        self._pipe: Pipe[Item] = Pipe(bytes_per_s=bytes_per_s, latency_s=latency_s)
        self._changed = threading.Condition()

    def put(self, item: Item, size: int, *, owner: int, urgent: bool) -> None:
        with self._changed:
            now_s = time.monotonic()
            self._pipe.put(item, size, now_s=now_s, owner=owner, urgent=urgent)
            self._changed.notify_all()

    def put_last(self, item: Item, *, owner: int) -> None:
        with self._changed:
            self._pipe.put_last(item, now_s=time.monotonic(), owner=owner)
            self._changed.notify_all()

    def take(self, timeout_s: float, *, owner: int) -> Item | None:
        """Wait up to ``timeout_s`` for what arrives for ``owner``."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                now_s = time.monotonic()
                item = self._pipe.take(now_s=now_s, owner=owner)
                if item is not None or now_s >= deadline_s:
                    return item
                due_s = self._pipe.next_due_s(owner=owner)
                until_s = deadline_s if due_s is None else min(due_s, deadline_s)
                self._changed.wait(max(0.0, until_s - now_s))

    def forget(self, owner: int) -> int:
        with self._changed:
            return self._pipe.forget(owner)


class EmulatedLink:
    """The link of one emulated device, which all its connections share. Thread-safe."""

    def __init__(self, emulation: Emulation) -> None:
        """Make the link; `wrap` each transport that goes over it."""
        self.latency_s = emulation.latency_s
        self.up: _Way[_Sent] = _Way(emulation.uplink_bytes_per_s, emulation.latency_s)
        self.down: _Way[_Came] = _Way(emulation.downlink_bytes_per_s, emulation.latency_s)
        self._owners = itertools.count()

    def wrap(self, transport: Transport) -> EmulatedTransport:
        """Return a transport that takes ``transport`` over this link."""
        return EmulatedTransport(transport, self, owner=next(self._owners))


class EmulatedTransport:
    """A `Transport` over another, whose `receive` must wait, with an `EmulatedLink` between.

    Two threads of its own: one hands over what has passed the uplink, one takes in what
    arrives, so that it passes the downlink while the owner computes. `publish`,
    `max_payload_bytes` and the counters may be used from any thread, all else only from the
    owner's. When the inner link breaks, what is still on its way up is lost; what is on its way
    down arrives before the `LinkDown`, as the last bytes of a closed connection do.
    """

    def __init__(self, inner: Transport, link: EmulatedLink, *, owner: int) -> None:
        """Take an unstarted transport; `EmulatedLink.wrap` calls this."""
        self._inner = inner
        self._link = link
        self._owner = owner
        self._filters: tuple[Filter, ...] = ()
        self._sender = threading.Thread(target=self._send, name="emulated-uplink", daemon=True)
        self._listener = threading.Thread(
            target=self._listen, name="emulated-downlink", daemon=True
        )
        self._stopping = threading.Event()
        self._is_started = False
        self._is_closed = False
        self._is_up = False
        self._failure: HsplitError | None = None
        self._data_sent_s = 0.0
        # Guards the counters below; told when `_unsent` falls.
        self._counting = threading.Condition()
        self._unsent = 0
        self._held_bytes = 0
        self._bytes_sent = 0
        self._bytes_received = 0

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that may be published."""
        return self._inner.max_payload_bytes

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed to the link since the start."""
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes that `receive` gave out since the start."""
        return self._bytes_received

    def start(self, filters: Sequence[Filter], *, timeout_s: float) -> None:
        """Start the inner transport; see `Transport.start`."""
        self._filters = tuple(filters)
        self._inner.start(filters, timeout_s=timeout_s)
        self._is_started = self._is_up = True
        self._sender.start()
        self._listener.start()

    def publish(self, topic: Topic, payload: Buffer) -> None:
        """Put one payload on the uplink; it is dropped while the link is down.

        Raises:
            PacketLimitError: the payload is larger than `max_payload_bytes`.
        """
        data = payload if isinstance(payload, bytes) else bytes(payload)
        check_size(topic, len(data), self)
        if not self._is_up:
            logger.debug("not published on %s: the link is down", topic.name)
            return
        with self._counting:
            self._unsent += 1
            self._bytes_sent += len(data)
        self._link.up.put(
            _Outgoing(topic, data), len(data), owner=self._owner, urgent=topic.lane == "control"
        )

    def flush(self, timeout_s: float) -> bool:
        """Wait until all of it has passed the uplink and the broker's word would be back."""
        deadline_s = time.monotonic() + timeout_s
        if not self._drained(timeout_s):
            return False
        if not self._inner.flush(max(0.0, deadline_s - time.monotonic())):
            return False
        back_s = self._data_sent_s + self._link.latency_s
        self._stopping.wait(max(0.0, min(back_s, deadline_s) - time.monotonic()))
        return back_s <= deadline_s

    def receive(self, timeout_s: float) -> TransportEvent | None:
        """Return the next event, waiting up to ``timeout_s`` for one; None if none came.

        Raises:
            TransportError: the link failed for good.
        """
        if self._failure is not None:
            raise self._failure
        came = self._link.down.take(timeout_s, owner=self._owner)
        if isinstance(came, _Failed):
            self._failure = came.error
            raise came.error
        if isinstance(came, Delivery):
            with self._counting:
                self._held_bytes -= len(came.payload)
                self._bytes_received += len(came.payload)
        return came

    def close(self, last_word: bytes | None = None) -> None:
        """Give what is on its way up two seconds, then close the inner transport."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_started:
            self._drained(CLOSE_TIMEOUT_S)
            self._is_up = False
            self._stopping.set()
            self._link.up.forget(self._owner)
            self._link.up.put_last(_Stop(), owner=self._owner)
            self._sender.join()
            self._listener.join()
            self._link.down.forget(self._owner)
        self._inner.close(last_word)

    def _drained(self, timeout_s: float) -> bool:
        with self._counting:
            return self._counting.wait_for(lambda: self._unsent == 0, timeout_s)

    def _settle(self, count: int) -> None:
        with self._counting:
            self._unsent -= count
            self._counting.notify_all()

    # --- the two threads ----------------------------------------------------------------------

    def _send(self) -> None:
        while True:
            going = self._link.up.take(POLL_S, owner=self._owner)
            if isinstance(going, _Stop):
                return
            if going is None:
                continue
            try:
                self._inner.publish(going.topic, going.payload)
            except HsplitError as error:
                self._link.down.put_last(_Failed(error), owner=self._owner)
            if going.topic.lane == "data":
                self._data_sent_s = time.monotonic()
            self._settle(1)

    def _listen(self) -> None:
        while not self._stopping.is_set():
            if self._held_bytes > MAX_HELD_BYTES:
                self._stopping.wait(POLL_S)
                continue
            try:
                event = self._inner.receive(POLL_S)
            except HsplitError as error:
                self._link.down.put_last(_Failed(error), owner=self._owner)
                return
            if event is not None:
                self._take_in(event)

    def _take_in(self, event: TransportEvent) -> None:
        if isinstance(event, Delivery):
            with self._counting:
                self._held_bytes += len(event.payload)
            self._link.down.put(
                event, len(event.payload), owner=self._owner, urgent=self._is_urgent(event.topic)
            )
            return
        self._is_up = isinstance(event, LinkUp)
        if isinstance(event, LinkDown):
            self._settle(self._link.up.forget(self._owner))
        self._link.down.put_last(event, owner=self._owner)

    def _is_urgent(self, topic: str) -> bool:
        return any(one.lane == "control" and matches(one.pattern, topic) for one in self._filters)
