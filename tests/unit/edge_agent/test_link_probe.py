"""The arithmetic of a link's measurement, over a link that keeps exact time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from edge_agent import link_probe
from edge_agent.link_probe import FASTEST_BYTES_PER_S, measure_link
from shared.errors import TransportError
from shared.protocol.messages import DeviceId
from shared.protocol.profile import LinkMeasurement
from shared.protocol.tensors import Buffer
from shared.protocol.topics import Filter, Topic, device_topic, echo_filters
from shared.transport.base import Delivery, LinkDown, LinkUp, TransportEvent
from tests.support.fake_clock import FakeClock

NANO = DeviceId("nano")
ECHO = device_topic(NANO, "echo")


@dataclass
class ExactLink:
    """A `Transport` to a broker that stores and forwards, under a clock that it moves itself.

    ``up`` and ``down`` in bytes per second, None for no time at all. An acknowledgement comes
    behind the echo that the same packet causes, as in a queue that both share. ``held_up``: the
    packet before which the machine stands still, and for how many seconds.
    """

    clock: FakeClock
    up: float | None
    down: float | None
    latency_s: float = 0.0
    max_payload_bytes: int = 999_488
    lose_echoes: bool = False
    cut_at_packet: int | None = None
    held_up: tuple[int, float] | None = None
    foreign: bytes | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    filters: Sequence[Filter] = ()
    closed: bool = False
    sizes: list[int] = field(default_factory=list)
    _acknowledged_s: float = 0.0
    _events: list[tuple[float, TransportEvent]] = field(default_factory=list)

    def start(self, filters: Sequence[Filter], *, timeout_s: float) -> None:
        self.filters = filters
        self._events.append((self.clock.monotonic_s(), LinkUp()))

    def publish(self, topic: Topic, payload: Buffer) -> None:
        assert topic == ECHO
        size = len(payload)
        assert size <= self.max_payload_bytes
        self.sizes.append(size)
        if self.cut_at_packet == len(self.sizes):
            self._events.append((self.clock.monotonic_s(), LinkDown("the cable")))
            return
        self.bytes_sent += size
        if self.held_up is not None and self.held_up[0] == len(self.sizes):
            self.clock.advance(self.held_up[1])
        up_s = 0.0 if self.up is None else size / self.up
        down_s = 0.0 if self.down is None else size / self.down
        stored_s = self.clock.monotonic_s() + self.latency_s + up_s
        self._acknowledged_s = stored_s + self.latency_s
        if self.filters and not self.lose_echoes:
            self._acknowledged_s += down_s
            if self.foreign is not None:
                self._events.append((stored_s, Delivery(ECHO.name, self.foreign)))
            delivery = Delivery(ECHO.name, bytes(payload))
            self._events.append((stored_s + down_s + self.latency_s, delivery))

    def flush(self, timeout_s: float) -> bool:
        deadline_s = self.clock.monotonic_s() + timeout_s
        self.clock.advance_to(min(deadline_s, self._acknowledged_s))
        return self._acknowledged_s <= deadline_s

    def receive(self, timeout_s: float) -> TransportEvent | None:
        deadline_s = self.clock.monotonic_s() + timeout_s
        if not self._events or self._events[0][0] > deadline_s:
            self.clock.advance_to(deadline_s)
            return None
        due_s, event = self._events.pop(0)
        self.clock.advance_to(due_s)
        return event

    def close(self) -> None:
        self.closed = True


class Links:
    """Makes a new link for each connection, as a real one would be, and remembers all."""

    def __init__(self, **properties) -> None:
        self.clock = FakeClock()
        self.made: list[ExactLink] = []
        self.properties = properties

    def __call__(self) -> ExactLink:
        self.made.append(ExactLink(self.clock, **self.properties))
        return self.made[-1]

    def measure(self) -> LinkMeasurement:
        return measure_link(self, NANO, clock=self.clock, timeout_s=1.0)


@pytest.mark.parametrize("latency_s", [0.0, 0.01, 0.3])
@pytest.mark.parametrize(
    ("up", "down"), [(2e6, 8e6), (8e6, 2e6), (1e4, 1e4), (1e5, 5e7), (1e8, 1e8)]
)
def test_the_rates_and_the_round_trip_are_the_links_own(up, down, latency_s):
    found = Links(up=up, down=down, latency_s=latency_s).measure()
    # The small packets' own time on the wire is counted as latency: 64 of 16384 bytes at most.
    assert found.uplink_bytes_per_s == pytest.approx(up, rel=0.02)
    assert found.downlink_bytes_per_s == pytest.approx(down, rel=0.02)
    small_s = link_probe.SMALL_BYTES * (1 / up + 1 / down)
    assert found.round_trip_s == pytest.approx(2 * latency_s + small_s)


@pytest.mark.parametrize("seconds", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("packet", range(1, 15))
def test_one_packet_that_a_busy_machine_held_up_changes_no_figure(packet, seconds):
    links = Links(up=2e6, down=8e6, latency_s=0.01, held_up=(packet, seconds))
    found = links.measure()
    assert any(packet <= len(link.sizes) for link in links.made), "it was held up"
    assert found.uplink_bytes_per_s == pytest.approx(2e6, rel=0.02)
    assert found.downlink_bytes_per_s == pytest.approx(8e6, rel=0.02)
    assert found.round_trip_s == pytest.approx(0.02, rel=0.01)


def test_a_link_too_quick_to_time_has_the_greatest_rate_that_is_told():
    found = Links(up=None, down=None).measure()
    assert found.uplink_bytes_per_s == found.downlink_bytes_per_s == FASTEST_BYTES_PER_S
    assert found.round_trip_s > 0


def test_the_way_up_is_measured_while_nobody_listens():
    links = Links(up=1e6, down=1e6)
    links.measure()
    assert [link.filters for link in links.made] == [(), echo_filters(NANO)]
    assert all(link.closed for link in links.made)


def test_a_slow_link_is_given_few_bytes_and_a_fast_one_many():
    slow, fast = Links(up=5e4, down=5e4), Links(up=1e8, down=1e8)
    slow.measure()
    fast.measure()
    assert max(slow.made[0].sizes) == link_probe.FIRST_BYTES
    assert max(fast.made[0].sizes) == 999_488
    assert slow.clock.monotonic_s() - 1000 < 6


def test_no_packet_is_larger_than_the_broker_takes():
    links = Links(up=1e8, down=1e8, max_payload_bytes=15_872)
    assert links.measure().uplink_bytes_per_s == pytest.approx(1e8, rel=0.02)
    assert max(links.made[0].sizes) == 15_872


@pytest.mark.parametrize("latency_s", [0.0, 0.1, 1.0])
def test_it_takes_about_five_seconds_at_most(latency_s):
    links = Links(up=1e6, down=1e6, latency_s=latency_s)
    links.measure()
    # Each direction: one small packet and one large that were begun within its budget.
    assert links.clock.monotonic_s() - 1000 < 5 + 8 * latency_s


def test_the_echo_of_another_measurement_is_not_taken_for_ones_own():
    found = Links(up=1e6, down=4e6, foreign=b"x" * 64).measure()
    assert found.downlink_bytes_per_s == pytest.approx(4e6, rel=0.02)


@pytest.mark.parametrize(
    "properties",
    [{"up": 2e3, "down": 1e6}, {"up": 1e6, "down": 2e3}, {"up": 10.0, "down": 1e6}],
    ids=["up", "down", "even small packets"],
)
def test_a_link_too_slow_to_measure_is_an_error_that_says_so(properties):
    links = Links(**properties)
    with pytest.raises(TransportError, match=r"bytes within 5 s: the link is too slow"):
        links.measure()
    assert all(link.closed for link in links.made)


def test_echoes_that_never_come_back_are_an_error_that_names_the_topic():
    """A broker of MQTT 3.1.1 cannot say that its access list swallows a packet."""
    with pytest.raises(TransportError, match="not passed back a packet of 64 .*" + ECHO.name):
        Links(up=1e6, down=1e6, lose_echoes=True).measure()


@pytest.mark.parametrize("packet", [1, 11])
def test_a_link_that_breaks_meanwhile_is_an_error_and_no_measurement(packet):
    links = Links(up=1e6, down=1e6, cut_at_packet=packet)
    with pytest.raises(TransportError, match="lost while it was measured: the cable"):
        links.measure()
    assert all(link.closed for link in links.made)
