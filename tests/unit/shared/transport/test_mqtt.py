"""What `MqttTransport` keeps while its link is only half there; no broker is needed for that."""

from __future__ import annotations

import pytest

from shared.config import BrokerSettings
from shared.protocol.messages import DeviceId, RunId
from shared.protocol.topics import device_topic, run_topic
from shared.transport.base import Delivery, LinkDown, LinkUp
from shared.transport.lane import LaneLost, LaneReady
from shared.transport.mqtt import EARLY_BYTES, MqttTransport

CHUNK = Delivery(run_topic(RunId("run"), DeviceId("nano"), "gradients").name, bytes(100_000))
STATUS = Delivery(device_topic(DeviceId("nano"), "status").name, b"offline")


class Half:
    """A transport with three lanes that are not connected, and say what the test says."""

    def __init__(self) -> None:
        self.transport = MqttTransport(BrokerSettings(url="mqtt://127.0.0.1:1"), client_name="x")
        for name in ("control", "sending", "receiving"):
            self.transport._lanes[name] = self.transport._make_lane(name)

    def connect(self, *names: str) -> None:
        for name in names:
            self.transport._inbox.push(LaneReady(self.transport._lanes[name], 1_000_000))

    def lose(self, name: str) -> None:
        self.transport._inbox.push(LaneLost(self.transport._lanes[name], "cut", answered=True))

    def deliver(self, *deliveries: Delivery) -> None:
        for one in deliveries:
            assert self.transport._inbox.offer(one)
            assert self.transport.receive(0) is None

    def events(self) -> list[object]:
        found = []
        while (event := self.transport.receive(0)) is not None:
            found.append(event)
        return found


@pytest.fixture
def half() -> Half:
    return Half()


def test_what_one_lane_delivers_while_another_is_down_is_bounded(half):
    half.connect("control", "receiving")
    half.deliver(STATUS, *[CHUNK] * 50)
    assert half.transport._early_bytes <= EARLY_BYTES
    half.connect("sending")
    first, *rest = half.events()
    assert first == LinkUp()
    assert rest[0] == STATUS, "a retained status would not come again"
    assert 1 < len(rest) < 1 + EARLY_BYTES / len(CHUNK.payload)
    assert half.transport.bytes_received == sum(len(one.payload) for one in rest)


def test_empty_payloads_are_bounded_too(half):
    half.deliver(*[Delivery(STATUS.topic, b"")] * 5000)
    assert len(half.transport._early) < 5000


def test_the_room_is_there_again_after_each_time_down(half):
    half.connect("control", "receiving", "sending")
    assert half.events() == [LinkUp()]
    for _ in range(3):
        half.lose("sending")
        (down,) = half.events()
        assert isinstance(down, LinkDown)
        half.deliver(*[CHUNK] * 20)
        half.connect("sending")
        assert len(half.events()) == 1 + EARLY_BYTES // len(CHUNK.payload)
    assert half.transport._early_bytes == 0
