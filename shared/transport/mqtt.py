"""The transport of a real run: three paho connections to one broker."""

from __future__ import annotations

import logging
import secrets
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence

from shared.config import BrokerSettings
from shared.errors import BrokerUnreachableError, PacketLimitError, TransportError
from shared.protocol.tensors import Buffer
from shared.protocol.topics import Filter, Topic
from shared.transport import refusals
from shared.transport.base import Delivery, LinkDown, LinkUp, TransportEvent, Will, check_size
from shared.transport.inbox import Inbox
from shared.transport.lane import (
    PACKET_LIMIT_BYTES,
    Endpoint,
    Lane,
    LaneDied,
    LaneLost,
    LaneName,
    LaneNotice,
    LaneReady,
    LaneRefused,
    ProtocolName,
)
from shared.transport.tls import tls_context

logger = logging.getLogger(__name__)

HEADER_BYTES = 512
"""Set aside in each packet for topic (at most 170 bytes of ours), packet id and properties."""
LEAST_PACKET_BYTES = 16 * 1024
"""Below this a tensor of a few MB would be thousands of messages."""
FLUSH_TIMEOUT_S = 2.0
SILENCE_S = 3.0
"""How long a broker may say nothing to MQTT 5 before 3.1.1 is tried, where both are allowed."""
CLOSED_OFTEN = 4
"""Connections closed without an answer, from which on `start` gives that as its error."""
MAX_DEATHS = 3
EARLY_BYTES = 1024 * 1024
"""What is kept while the link is not up: every retained status, and little of a stream."""


class MqttTransport:
    """A `Transport` over three connections: control, sending bulk, receiving bulk.

    On one connection a ping waits behind bulk for up to a second, and a connection that
    both sends and receives bulk can block itself at a broker that pushes back.

    Threads: paho's three network threads run the callbacks of `Lane`, which only queue.
    `publish`, `max_payload_bytes` and `bytes_sent` may be used from any thread, all else only
    from the owner's. The link is up when all three lanes are, and `receive` tells each change
    once, in order. While it is down, what is published is dropped: the session is new each
    time and the protocol repeats what was not answered. A will has no delay: MQTT 5 honours
    one only for sessions that outlive their connection, which ours do not.
    """

    def __init__(
        self, settings: BrokerSettings, *, client_name: str, will: Will | None = None
    ) -> None:
        """Prepare for one broker; nothing is connected yet.

        A random suffix goes behind ``client_name``: a broker throws out the first of two
        clients with one id, and a second agent must not do that to the first.
        """
        self._settings = settings
        self._client_name = f"{client_name}-{secrets.token_hex(4)}"
        self._will = will
        self._filters: tuple[Filter, ...] = ()
        self._protocol: ProtocolName = "3.1.1" if settings.protocol == "3.1.1" else "5"
        self._tls: ssl.SSLContext | None = None
        self._inbox: Inbox[LaneNotice] = Inbox()
        # What arrived before the link was up: the first lanes deliver while the last connects.
        self._early: deque[TransportEvent] = deque()
        self._early_bytes = 0
        self._lanes: dict[LaneName, Lane] = {}
        self._ready: set[Lane] = set()
        self._unanswered = 0
        self._deaths = 0
        self._is_up = False
        self._is_closed = False
        self._packet_limit_bytes = PACKET_LIMIT_BYTES
        self._bytes_sent = 0
        self._bytes_received = 0
        self._counting = threading.Lock()

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that may be published: the broker's limit less the packet's header."""
        return self._packet_limit_bytes - HEADER_BYTES

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed to the link since the start."""
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes that `receive` gave out since the start."""
        return self._bytes_received

    @property
    def protocol(self) -> ProtocolName:
        """The MQTT version in use; settled once `start` has returned."""
        return self._protocol

    def start(self, filters: Sequence[Filter], *, timeout_s: float) -> None:
        """Connect, subscribe and publish the birth; return when all of that is acknowledged.

        Keeps trying for ``timeout_s``, as the broker may come up after us. `receive` then
        gives `LinkUp` first.

        Raises:
            BrokerUnreachableError: nobody answered within ``timeout_s``.
            BrokerRefusedError: the broker said no, to the connection or to a subscription.
            PacketLimitError: the broker's packet limit is below what a chunk needs.
            ConfigError: a certificate or password file cannot be read.
        """
        self._filters = tuple(filters)
        self._tls = tls_context(self._settings) if self._settings.tls else None
        try:
            self._open_lanes()
            self._await_link(timeout_s)
        except BaseException:
            self.close()
            raise
        logger.info("connected to broker %s, MQTT %s", self._settings.url, self._protocol)

    def publish(self, topic: Topic, payload: Buffer) -> None:
        """Hand over one payload; it is dropped while the link is down. Any thread may call.

        Raises:
            PacketLimitError: the payload is larger than `max_payload_bytes`.
        """
        size = memoryview(payload).nbytes
        check_size(topic, size, self, broker=f"broker {self._settings.url}")
        lanes = self._lanes
        if not lanes or not all(lane.ready for lane in lanes.values()):
            logger.debug("not published on %s: the link is down", topic.name)
            return
        lanes["control" if topic.lane == "control" else "sending"].publish(topic, payload)
        with self._counting:
            self._bytes_sent += size

    def receive(self, timeout_s: float) -> TransportEvent | None:
        """Return the next event, waiting up to ``timeout_s`` for one; None if none came.

        `Delivery` comes only between a `LinkUp` and the next `LinkDown`.

        Raises:
            TransportError: the link failed for good (the broker now refuses us, say).
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._is_up and self._early:
                return self._taken(self._early.popleft())
            item = self._inbox.take(max(0.0, deadline - time.monotonic()))
            if item is None:
                return None
            if isinstance(item, Delivery):
                self._keep(item)
                continue
            event = self._follow(item)
            if event is not None:
                return event

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged what was published on the data lane last."""
        return self._lanes["sending"].flush(timeout_s)

    def close(self, last_word: bytes | None = None) -> None:
        """Publish the death notice, disconnect, and stop every thread. May be called twice.

        ``last_word`` is published in place of the death notice.
        """
        if self._is_closed:
            return
        self._is_closed = True
        control = self._lanes.get("control")
        if self._will is not None and control is not None and control.ready:
            control.publish(self._will.topic, last_word or self._will.death)
        self._close_lanes()

    # --- the three lanes ---------------------------------------------------------------------

    def _open_lanes(self) -> None:
        self._lanes = {name: self._make_lane(name) for name in ("control", "sending", "receiving")}
        for lane in self._lanes.values():
            lane.open()

    def _make_lane(self, name: LaneName) -> Lane:
        wanted = {"control": "control", "receiving": "data"}.get(name)
        return Lane(
            name,
            Endpoint(self._settings, self._client_name, self._protocol, self._tls),
            filters=[one for one in self._filters if one.lane == wanted],
            will=self._will if name == "control" else None,
            inbox=self._inbox,
        )

    def _close_lanes(self) -> None:
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        lanes, self._lanes = list(self._lanes.values()), {}
        for lane in lanes:
            flushed = lane.flush(max(0.0, deadline - time.monotonic()))
            lane.disconnect(politely=flushed)
        for lane in lanes:
            lane.join()
        self._ready.clear()

    # --- following what the lanes tell -------------------------------------------------------

    def _await_link(self, timeout_s: float) -> None:
        start = time.monotonic()
        if self._settings.protocol == "auto":
            self._listen(start + min(SILENCE_S, timeout_s / 2))
            if self._protocol == "5" and any(lane.is_kept_waiting for lane in self._current):
                self._fall_back("did not answer in MQTT 5")
        self._listen(start + timeout_s)
        if not self._is_up and self._unanswered >= CLOSED_OFTEN:
            raise refusals.never_answered(self._settings)
        if not self._is_up:
            raise self._unreachable(timeout_s)
        self._early.appendleft(LinkUp())

    def _listen(self, deadline: float) -> None:
        """Follow the lanes until the link is up or time is, keeping what arrives meanwhile."""
        while not self._is_up:
            item = self._inbox.take(max(0.0, deadline - time.monotonic()))
            if item is None:
                return
            if isinstance(item, Delivery):
                self._keep(item)
                continue
            if isinstance(item, LaneLost) and not item.answered:
                self._unanswered += 1
            self._follow(item)

    @property
    def _current(self) -> tuple[Lane, ...]:
        return tuple(self._lanes.values())

    def _follow(self, notice: LaneNotice) -> LinkUp | LinkDown | None:
        """Take in what one lane tells; return what that means for the link."""
        if notice.lane not in self._current:
            return None  # from a lane that was replaced since
        if isinstance(notice, LaneReady):
            return self._lane_ready(notice)
        if isinstance(notice, LaneRefused):
            return self._lane_refused(notice)
        if isinstance(notice, LaneDied):
            self._replace(notice)
        return self._lane_lost(notice.lane, notice.reason)

    def _lane_ready(self, notice: LaneReady) -> LinkUp | None:
        limit = notice.packet_limit_bytes
        if limit < LEAST_PACKET_BYTES:
            raise PacketLimitError(
                f"broker {self._settings.url} takes packets of at most {limit} bytes; at least "
                f"{LEAST_PACKET_BYTES} are needed: raise its max_packet_size"
            )
        self._packet_limit_bytes = limit
        self._ready.add(notice.lane)
        if self._is_up or len(self._ready) < len(self._lanes):
            return None
        self._is_up = True
        self._deaths = 0
        return LinkUp()

    def _lane_refused(self, notice: LaneRefused) -> LinkDown | None:
        older = notice.unsupported_protocol and self._settings.protocol == "auto"
        if not older or self._protocol == "3.1.1":
            raise notice.error
        self._fall_back("knows no MQTT 5")
        return self._link_lost("the broker no longer speaks MQTT 5")

    def _fall_back(self, reason: str) -> None:
        """Begin again with MQTT 3.1.1."""
        logger.info("broker %s %s; using 3.1.1", self._settings.url, reason)
        self._close_lanes()
        self._protocol = "3.1.1"
        self._open_lanes()

    def _lane_lost(self, lane: Lane, reason: str) -> LinkDown | None:
        self._ready.discard(lane)
        return self._link_lost(f"{lane.name} connection to {self._settings.url}: {reason}")

    def _link_lost(self, reason: str) -> LinkDown | None:
        if not self._is_up:
            return None
        self._is_up = False
        self._early.clear()
        self._early_bytes = 0
        return LinkDown(reason)

    def _replace(self, notice: LaneDied) -> None:
        """Put a new lane where paho's network thread ended by itself."""
        self._deaths += 1
        logger.error("the thread of the %s connection ended: %s", notice.lane.name, notice.reason)
        if self._deaths > MAX_DEATHS:
            raise TransportError(
                f"the network thread to {self._settings.url} ended {self._deaths} times in a "
                f"row: {notice.reason}; this is a fault in hsplit or paho-mqtt, please report it"
            )
        notice.lane.disconnect(politely=False)
        lane = self._make_lane(notice.lane.name)
        self._lanes = {**self._lanes, lane.name: lane}
        lane.open()

    def _keep(self, delivery: Delivery) -> None:
        """Keep a delivery until it may be told; beyond the limit it is dropped.

        One connection may be down for hours while another delivers. What is dropped here is
        repeated once the link is up; a retained status would not be, so the first ones stay.
        """
        size = HEADER_BYTES + len(delivery.payload)
        if not self._is_up and self._early_bytes + size > EARLY_BYTES:
            logger.debug("dropped a payload on %s: the link is not up", delivery.topic)
            return
        self._early.append(delivery)
        self._early_bytes += size

    def _taken(self, event: TransportEvent) -> TransportEvent:
        if isinstance(event, Delivery):
            self._early_bytes -= HEADER_BYTES + len(event.payload)
            self._bytes_received += len(event.payload)
        return event

    def _unreachable(self, timeout_s: float) -> BrokerUnreachableError:
        errors = [lane.connect_error for lane in self._current if lane.connect_error is not None]
        return refusals.unreachable(
            self._settings, errors[0] if errors else None, timeout_s=timeout_s
        )
