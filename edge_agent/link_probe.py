"""Measures the way through the broker with packets of a device's own, which come back to it.

First up, while nobody listens: bytes over the time until the broker has acknowledged them.
Then up and back down: the broker keeps a packet until it has all of it and passes it on then,
so what an echo takes beyond the known way up is the way down. Both at once would not tell them
apart: on a link with one queue, an acknowledgement waits behind the echo that comes with it.
"""

from __future__ import annotations

import logging
import os
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_agent.emulation import EmulatedLink, over_link
from shared.clock import Clock
from shared.config import BrokerSettings
from shared.errors import TransportError
from shared.protocol.messages import DeviceId
from shared.protocol.profile import LinkMeasurement
from shared.protocol.topics import device_topic, echo_filters
from shared.transport.base import Delivery, LinkDown, Transport
from shared.transport.mqtt import MqttTransport

logger = logging.getLogger(__name__)

SMALL_BYTES = 64
SMALL_PACKETS = 9
SMALL_BUDGET_S = 0.5
FIRST_BYTES = 16 * 1024
GROWTH = 8
ENOUGH_S = 0.15
"""A packet that takes so long is told from latency and from a busy machine."""
PACKETS = 5
"""Packets of the last size, of which the median counts."""
BUDGET_S = 2.0
"""For each direction, but for two packets at least."""
PACKET_TIMEOUT_S = 5.0
FASTEST_BYTES_PER_S = 1e9
LEAST_S = 1e-6
_NONCE_BYTES = 8


def connection(settings: BrokerSettings, device: DeviceId) -> Transport:
    """Return an unstarted connection of a device that only measures: it has no will."""
    return MqttTransport(settings, client_name=f"hsplit-{device}-probe")


def measurer(
    settings: BrokerSettings, device: DeviceId, *, clock: Clock, emulated: EmulatedLink | None
) -> Callable[[], LinkMeasurement]:
    """Return what measures a device's link, slowed as the device's other connections are."""

    def connect() -> Transport:
        return over_link(connection(settings, device), emulated)

    timeout_s = settings.connect_timeout_s
    return lambda: measure_link(connect, device, clock=clock, timeout_s=timeout_s)


def measure_link(
    connect: Callable[[], Transport], device: DeviceId, *, clock: Clock, timeout_s: float
) -> LinkMeasurement:
    """Return what the link of ``device`` carries, in about five seconds or less.

    ``connect`` makes an unstarted transport; two are started in turn, for up to ``timeout_s``
    each, and closed again. Where a packet of the largest size passes too quickly to be timed
    (over loopback, say), its rate is a lower bound: at most `FASTEST_BYTES_PER_S`.

    Raises:
        TransportError: the broker cannot be reached or refuses, the link was lost meanwhile, or
            a small packet took more than `PACKET_TIMEOUT_S`.
    """
    with _Probe(connect(), device, clock) as probe:
        probe.start(listen=False, timeout_s=timeout_s)
        up = _climb(probe.upload, _Way(), largest=probe.max_payload_bytes, clock=clock)
    with _Probe(connect(), device, clock) as probe:
        probe.start(listen=True, timeout_s=timeout_s)
        down = _climb(probe.echo, up, largest=probe.max_payload_bytes, clock=clock)
    return LinkMeasurement(
        uplink_bytes_per_s=up.rate,
        downlink_bytes_per_s=down.rate,
        round_trip_s=max(down.small_s, LEAST_S),
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """What was found of one direction; made without arguments, of one that takes no time.

    ``small_s``: what a small packet took in all. ``by_size``: the bytes that a larger packet
    held beyond that → the seconds that these spent on the wire.
    """

    small_s: float = 0.0
    by_size: Mapping[int, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Bytes per second of the largest packets."""
        size = max(self.by_size)
        return size / self.by_size[size]

    def seconds(self, size: int) -> float:
        """Return how long ``size`` bytes take: as packets of that size, or the next smaller."""
        if not self.by_size:
            return 0.0
        known = max((one for one in self.by_size if one <= size), default=min(self.by_size))
        return self.by_size[known] * size / known


def _climb(take: Callable[[int], float], before: _Way, *, largest: int, clock: Clock) -> _Way:
    """Time ever larger packets until they take long enough, then several of the last size.

    ``take`` sends a packet and returns its seconds; ``before`` is the way that it goes first.
    A busy machine makes a packet late, never early: what took long is asked for again before it
    is believed, and small packets that were later than a large one are measured anew. Seconds
    are charged to the budget as the median says, so that one held-up packet does not end it.
    """
    small_s = _small(take, clock)
    left_s = BUDGET_S
    by_size: dict[int, float] = {}
    size = min(FIRST_BYTES, largest)

    def is_last(taken: Sequence[float]) -> bool:
        whole_s = statistics.median_low(taken)
        beyond = size - SMALL_BYTES
        wire_s = whole_s - small_s - before.seconds(beyond)
        by_size[beyond] = max(wire_s, beyond / FASTEST_BYTES_PER_S)
        bigger_s = small_s + (whole_s - small_s) * min(GROWTH, largest / size)
        return wire_s >= ENOUGH_S or size == largest or bigger_s > left_s - whole_s * len(taken)

    while True:
        taken = [take(size)]
        if taken[0] < small_s:
            small_s = _small(take, clock)
        if is_last(taken):
            affordable = int(left_s / taken[0]) if taken[0] else PACKETS
            taken += [take(size) for _ in range(1, max(2, min(PACKETS, affordable)))]
            if is_last(taken):
                return _Way(small_s, by_size)
        left_s -= statistics.median_low(taken) * len(taken)
        size = min(size * GROWTH, largest)


def _small(take: Callable[[int], float], clock: Clock) -> float:
    """Return the median seconds of small packets; at least one is sent."""
    deadline_s = clock.monotonic_s() + SMALL_BUDGET_S
    taken = [take(SMALL_BYTES)]
    while len(taken) < SMALL_PACKETS and clock.monotonic_s() < deadline_s:
        taken.append(take(SMALL_BYTES))
    return statistics.median_low(taken)


class _Probe:
    """One short-lived connection that sends packets on the device's own echo topic."""

    def __init__(self, transport: Transport, device: DeviceId, clock: Clock) -> None:
        self._transport = transport
        self._device = device
        self._topic = device_topic(device, "echo")
        self._clock = clock
        # Another measurement of the same device must not be taken for this one.
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._number = 0
        self._filler = b""

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._transport.close()

    @property
    def max_payload_bytes(self) -> int:
        return self._transport.max_payload_bytes

    def start(self, *, listen: bool, timeout_s: float) -> None:
        filters = echo_filters(self._device) if listen else ()
        self._transport.start(filters, timeout_s=timeout_s)
        self._watch(0.0)  # that the link is up
        # Random, as a compressing tunnel would make nothing of zeros.
        self._filler = os.urandom(self._transport.max_payload_bytes)

    def upload(self, size: int) -> float:
        """Return the seconds until the broker has acknowledged a packet."""
        began_s = self._publish(size)[1]
        if not self._transport.flush(PACKET_TIMEOUT_S):
            self._watch(0.0)  # a lost link says more
            raise self._too_slow(size, "acknowledged")
        seconds = self._clock.monotonic_s() - began_s
        self._watch(0.0)
        return seconds

    def echo(self, size: int) -> float:
        """Return the seconds until a packet was back."""
        sent, began_s = self._publish(size)
        deadline_s = began_s + PACKET_TIMEOUT_S
        while (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            came = self._watch(left_s)
            if came is not None and bytes(came.payload[: len(sent)]) == sent:
                return self._clock.monotonic_s() - began_s
        raise self._too_slow(size, "passed back")

    def _publish(self, size: int) -> tuple[bytes, float]:
        """Send one packet; return how it begins, and when it was sent."""
        self._number += 1
        begin = self._nonce + self._number.to_bytes(4, "big")
        packet = begin + self._filler[len(begin) : size]
        sent_before = self._transport.bytes_sent
        began_s = self._clock.monotonic_s()
        self._transport.publish(self._topic, packet)
        if self._transport.bytes_sent == sent_before:
            self._watch(0.0)
            raise self._lost("the connection is down")
        return begin, began_s

    def _watch(self, timeout_s: float) -> Delivery | None:
        """Return the next payload, or None if none comes; raise where the link broke."""
        event = self._transport.receive(timeout_s)
        if isinstance(event, LinkDown):
            raise self._lost(event.reason)
        return event if isinstance(event, Delivery) else None

    def _lost(self, reason: str) -> TransportError:
        return TransportError(f"the link to the broker was lost while it was measured: {reason}")

    def _too_slow(self, size: int, done: str) -> TransportError:
        return TransportError(
            f"the broker has not {done} a packet of {size} bytes within {PACKET_TIMEOUT_S:g} s: "
            "the link is too slow to train over, or the broker's access list does not let this "
            f"device write and read {self._topic.name}"
        )
