"""An emulated link over a real mosquitto: its rates, its latency, and what overtakes what."""

from __future__ import annotations

import functools
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_agent.emulation import EmulatedLink, parse_emulation
from edge_agent.emulation.link import EmulatedTransport
from edge_agent.link_probe import connection, measure_link
from shared.clock import SystemClock
from shared.config import BrokerSettings
from shared.errors import BrokerRefusedError, PacketLimitError
from shared.protocol.topics import Filter
from shared.transport.base import Delivery, LinkDown, LinkUp, TransportEvent
from shared.transport.mqtt import MqttTransport
from tests.broker.events import (
    ACTIVATIONS,
    CONTROL,
    DATA,
    NANO,
    REQUESTS,
    STATUSES,
    WILL,
    Connect,
    await_payload,
    payload,
)
from tests.support.brokers import Mosquitto, wait_until

pytestmark = pytest.mark.broker

CHUNK = 250_000
LATENCY_S = 0.02

Device = Callable[..., EmulatedTransport]


@pytest.fixture
def device(mosquitto: Mosquitto) -> Iterator[Device]:
    """Connect over an emulated link: `device("uplink=8Mbit/s", DATA)`, or over one made before."""
    with ExitStack() as stack:

        def connect(over: str | EmulatedLink, *filters: Filter, **more) -> EmulatedTransport:
            link = EmulatedLink(parse_emulation(over)) if isinstance(over, str) else over
            settings = BrokerSettings(url=more.get("url", mosquitto.url))
            transport = link.wrap(MqttTransport(settings, client_name="d", will=more.get("will")))
            stack.callback(transport.close)
            transport.start(filters, timeout_s=10)
            assert transport.receive(1.0) == LinkUp()
            return transport

        yield connect


def following(transport: EmulatedTransport, timeout_s: float = 20.0) -> TransportEvent | None:
    return transport.receive(timeout_s)


def delivered(transport: EmulatedTransport) -> bytes:
    event = following(transport)
    assert isinstance(event, Delivery)
    return bytes(event.payload)


@pytest.mark.parametrize("count", [20, 200])
def test_what_goes_up_takes_its_time(mosquitto, connect: Connect, device: Device, count: int):
    server, small = connect(mosquitto.url, DATA), device(f"uplink={count * CHUNK}B/s")
    began = time.monotonic()
    for _ in range(count):
        small.publish(ACTIVATIONS, bytes(CHUNK))
    assert time.monotonic() - began < 0.5, "publish does not wait for the link"
    for _ in range(count):
        assert len(payload(server)) == CHUNK
    assert time.monotonic() - began == pytest.approx(1.0, rel=0.1)
    assert small.bytes_sent == count * CHUNK


def test_what_comes_down_takes_its_time(mosquitto, connect: Connect, device: Device):
    server, small = connect(mosquitto.url), device("downlink=40Mbit/s", DATA)
    began = time.monotonic()
    for _ in range(20):
        server.publish(ACTIVATIONS, bytes(CHUNK))
    for _ in range(20):
        assert len(delivered(small)) == CHUNK
    assert time.monotonic() - began == pytest.approx(1.0, rel=0.1)
    assert small.bytes_received == 20 * CHUNK


def test_what_arrives_while_the_device_computes_is_there_when_it_looks(
    mosquitto, connect: Connect, device: Device
):
    server, small = connect(mosquitto.url), device("downlink=20Mbit/s", DATA)
    for _ in range(4):
        server.publish(ACTIVATIONS, bytes(CHUNK))  # 0.4 s
    threading.Event().wait(0.6)
    began = time.monotonic()
    for _ in range(4):
        delivered(small)
    assert time.monotonic() - began < 0.1


def test_a_round_trip_is_longer_by_twice_the_latency(mosquitto, connect: Connect, device: Device):
    def round_trip_s(transport) -> float:
        began = time.monotonic()
        transport.publish(REQUESTS, b"ping")
        assert isinstance(transport.receive(5), Delivery)
        return time.monotonic() - began

    far = device(f"latency={LATENCY_S}s", CONTROL)
    times = statistics.median(round_trip_s(far) for _ in range(15))
    far.close()
    near = connect(mosquitto.url, CONTROL)
    without = statistics.median(round_trip_s(near) for _ in range(15))
    assert times - without == pytest.approx(2 * LATENCY_S, rel=0.2)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_small_request_does_not_wait_behind_bulk(
    mosquitto, connect: Connect, device: Device, way: str
):
    server = connect(mosquitto.url, CONTROL)
    small = device("uplink=8Mbit/s,downlink=8Mbit/s", DATA, CONTROL)
    sender = small if way == "up" else server
    for _ in range(8):
        sender.publish(ACTIVATIONS, bytes(CHUNK))  # 2 s
    threading.Event().wait(0.1)
    began = time.monotonic()
    sender.publish(REQUESTS, b"now")
    if way == "up":
        await_payload(server, b"now")
    else:
        assert delivered(small) == b"now"
    assert time.monotonic() - began < 0.2


def test_two_connections_of_a_device_share_its_link(mosquitto, connect: Connect, device: Device):
    server = connect(mosquitto.url, DATA)
    link = EmulatedLink(parse_emulation("uplink=20Mbit/s"))
    both = device(link), device(link)
    began = time.monotonic()
    for _ in range(5):
        for one in both:
            one.publish(ACTIVATIONS, bytes(CHUNK))
    for _ in range(10):
        payload(server)
    assert time.monotonic() - began == pytest.approx(1.0, rel=0.1)


def test_a_device_measures_the_link_that_it_plays(mosquitto: Mosquitto):
    link = EmulatedLink(parse_emulation("uplink=16Mbit/s,downlink=40Mbit/s,latency=10ms"))
    connect = functools.partial(connection, BrokerSettings(url=mosquitto.url), NANO)
    found = measure_link(lambda: link.wrap(connect()), NANO, clock=SystemClock(), timeout_s=10)
    assert found.uplink_bytes_per_s == pytest.approx(2e6, rel=0.15)
    assert found.downlink_bytes_per_s == pytest.approx(5e6, rel=0.15)
    assert found.round_trip_s == pytest.approx(0.02, rel=0.3)


def test_a_flush_takes_as_long_as_the_way_up_and_the_word_back(device: Device):
    small = device(f"uplink=20Mbit/s,latency={LATENCY_S}s")
    assert small.flush(0.0)
    began = time.monotonic()
    for _ in range(4):
        small.publish(ACTIVATIONS, bytes(CHUNK))
    assert not small.flush(0.1)
    assert small.flush(5.0)
    assert time.monotonic() - began == pytest.approx(0.4 + 2 * LATENCY_S, rel=0.15)


def test_everything_comes_once_and_in_order(mosquitto, connect: Connect, device: Device):
    server = connect(mosquitto.url, DATA)
    small = device("uplink=80Mbit/s,latency=5ms", DATA)
    for number in range(200):
        small.publish(ACTIVATIONS, memoryview(number.to_bytes(2, "big") + bytes(5_000)))
    expected = list(range(200))
    assert [int.from_bytes(payload(server)[:2], "big") for _ in expected] == expected
    assert [int.from_bytes(delivered(small)[:2], "big") for _ in expected] == expected


def test_what_was_queued_is_lost_with_the_link_and_nothing_else(
    mosquitto: Mosquitto, device: Device
):
    small = device("uplink=8Mbit/s", DATA)
    for _ in range(40):
        small.publish(ACTIVATIONS, b"old" + bytes(CHUNK))
    mosquitto.kill()
    assert isinstance(following(small), LinkDown)
    small.publish(ACTIVATIONS, b"dropped")
    mosquitto.start()
    assert following(small) == LinkUp()
    small.publish(ACTIVATIONS, b"new")
    assert delivered(small) == b"new"
    assert small.receive(0.2) is None


def test_what_came_before_the_link_broke_is_delivered_first(
    mosquitto: Mosquitto, connect: Connect, device: Device
):
    server, small = connect(mosquitto.url), device("downlink=4Mbit/s,latency=50ms", DATA)
    server.publish(ACTIVATIONS, b"last words" + bytes(CHUNK))
    assert server.flush(5.0)
    wait_until(lambda: small._held_bytes > CHUNK, "the broker has passed it on")
    mosquitto.kill()
    assert delivered(small).startswith(b"last words")
    assert isinstance(following(small, 1.0), LinkDown)


def test_a_goodbye_waits_for_what_is_on_its_way(mosquitto, connect: Connect, device: Device):
    server = connect(mosquitto.url, DATA, STATUSES)
    small = device("uplink=8Mbit/s,latency=10ms", will=WILL)
    await_payload(server, b"online")
    for _ in range(3):
        small.publish(ACTIVATIONS, bytes(CHUNK))
    small.close()
    small.close()
    got = [len(payload(server)) for _ in range(4)]
    assert sorted(got) == [len(b"offline"), CHUNK, CHUNK, CHUNK]
    alive = [one.name for one in threading.enumerate() if one.name.startswith("emulated")]
    assert alive == []


def test_what_is_closed_holds_nothing_open(mosquitto, device: Device):
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    gc.disable()
    try:
        before = open_files()
        small = device("latency=5ms", DATA)
        assert open_files() > before
        small.close()
        assert open_files() == before
    finally:
        gc.enable()


def test_too_large_a_payload_is_refused_at_once(device: Device):
    small = device("uplink=8Mbit/s")
    with pytest.raises(PacketLimitError, match="is larger than"):
        small.publish(ACTIVATIONS, bytes(small.max_payload_bytes + 1))


def test_what_the_broker_refuses_ends_the_receiving(tmp_path: Path, device: Device):
    acl = tmp_path / "acl"
    acl.write_text("topic read hsplit/v1/#\n")
    folder = tmp_path / "guarded"
    folder.mkdir()
    with Mosquitto(folder, acl_file=str(acl)) as guarded:
        small = device("latency=5ms", url=guarded.url)
        small.publish(ACTIVATIONS, b"not allowed")
        for _ in range(2):
            with pytest.raises(BrokerRefusedError, match="access list"):
                small.receive(5.0)
        small.close()


def test_a_start_that_fails_leaves_nothing_running(mosquitto: Mosquitto, device: Device):
    mosquitto.kill()
    link = EmulatedLink(parse_emulation("latency=5ms"))
    unreachable = link.wrap(MqttTransport(BrokerSettings(url=mosquitto.url), client_name="d"))
    with pytest.raises(Exception, match="no broker answers"):
        unreachable.start((), timeout_s=0.3)
    unreachable.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("emulated")]
