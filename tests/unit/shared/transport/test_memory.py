"""The in-process broker keeps MQTT's promises and breaks them only as its faults say."""

from __future__ import annotations

import pytest

from shared.errors import BrokerUnreachableError, PacketLimitError
from shared.protocol.messages import DeviceId, RunId
from shared.protocol.topics import Filter, Topic, coordinator_filters, device_topic, run_topic
from shared.transport.base import Delivery, LinkDown, LinkUp, TransportEvent, Will
from shared.transport.memory import Faults, MemoryBroker, MemoryTransport, matches
from tests.support.fake_clock import FakeClock
from tests.support.faults import (
    RandomFaults,
    ScriptedFaults,
    delay_nth,
    drop_nth,
    duplicate_nth,
)

RUN, NANO = RunId("run"), DeviceId("nano")
ACTIVATIONS = run_topic(RUN, NANO, "activations")
STATUS = device_topic(NANO, "status")
WILL = Will(STATUS, b"online", b"offline")


class Network:
    """A broker, a coordinator that is connected, and the clock that moves them."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock, faults=faults)
        self.coordinator = self.connect("coordinator", coordinator_filters(RUN))
        assert self.coordinator.receive(0) == LinkUp()

    def connect(
        self, name: str, filters: tuple[Filter, ...] = (), will: Will | None = None
    ) -> MemoryTransport:
        transport = MemoryTransport(self.broker, name=name, will=will)
        transport.start(filters, timeout_s=1)
        return transport

    def sender(self) -> MemoryTransport:
        nano = self.connect("nano")
        assert nano.receive(0) == LinkUp()
        return nano

    def arriving(self, at: MemoryTransport | None = None) -> list[TransportEvent]:
        events = []
        while (event := (at or self.coordinator).receive(10)) is not None:
            events.append(event)
        return events

    def payloads(self) -> list[bytes]:
        return [bytes(e.payload) for e in self.arriving() if isinstance(e, Delivery)]

    def run_until_quiet(self) -> list[bytes]:
        payloads = self.payloads()
        while (due_s := self.broker.next_due_s()) is not None:
            self.clock.advance_to(due_s)
            payloads += self.payloads()
        return payloads


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("a/b", "a/c", False),
        ("+", "a/b", False),
    ],
)
def test_a_plus_stands_for_exactly_one_level(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected


def test_payloads_arrive_in_order_at_those_who_subscribed():
    network = Network()
    nano = network.connect("nano")
    for number in range(5):
        nano.publish(ACTIVATIONS, bytes([number]))
    nano.publish(run_topic(RunId("other"), NANO, "activations"), b"of another run")
    assert network.payloads() == [bytes([number]) for number in range(5)]
    assert network.arriving(nano) == [LinkUp()]


def test_a_retained_birth_waits_for_those_who_come_later():
    network = Network()
    network.connect("nano", will=WILL)
    late = network.connect("late", (Filter(STATUS.name),))
    assert network.arriving(late) == [LinkUp(), Delivery(STATUS.name, b"online")]


def test_a_client_that_vanishes_leaves_its_will_and_receives_nothing_more():
    network = Network()
    nano = network.connect("nano", (Filter(ACTIVATIONS.name),), WILL)
    nano.vanish()
    nano.publish(ACTIVATIONS, b"from the dead")
    assert network.payloads() == [b"online", b"offline"]
    assert network.arriving(nano) == []


def test_closing_twice_says_goodbye_once():
    network = Network()
    nano = network.connect("nano", will=WILL)
    nano.close()
    nano.close()
    assert network.payloads() == [b"online", b"offline"]


def test_a_broker_restart_loses_what_was_retained_and_tells_both_ends():
    network = Network()
    nano = network.connect("nano", will=WILL)
    network.payloads()
    network.broker.stop()
    nano.publish(ACTIVATIONS, b"dropped")
    network.broker.restart()
    nano.publish(ACTIVATIONS, b"sent")
    assert network.arriving() == [
        LinkDown("the broker stopped"),
        LinkUp(),
        Delivery(STATUS.name, b"online"),
        Delivery(ACTIVATIONS.name, b"sent"),
    ]


def test_one_lost_link_is_a_will_for_the_others_and_a_birth_on_return():
    network = Network()
    nano = network.connect("nano", will=WILL)
    nano.lose_link("cable pulled")
    nano.reconnect()
    assert network.payloads() == [b"online", b"offline", b"online"]
    assert network.arriving(nano) == [LinkUp(), LinkDown("cable pulled"), LinkUp()]


def test_a_stopped_broker_cannot_be_reached():
    network = Network()
    network.broker.stop()
    with pytest.raises(BrokerUnreachableError):
        network.connect("nano")


def test_a_payload_over_the_limit_is_refused_before_it_is_sent():
    network = Network()
    nano = network.connect("nano")
    with pytest.raises(PacketLimitError, match="999489"):
        nano.publish(ACTIVATIONS, bytes(999_489))
    assert network.broker.traffic == []


def test_bytes_are_counted_at_both_ends_and_all_traffic_is_kept():
    network = Network()
    nano = network.connect("nano", will=WILL)
    nano.publish(ACTIVATIONS, memoryview(b"12345"))
    network.payloads()
    assert (nano.bytes_sent, network.coordinator.bytes_received) == (5, 5 + len(b"online"))
    assert network.broker.traffic == [(STATUS.name, b"online"), (ACTIVATIONS.name, b"12345")]


def test_the_third_activations_can_be_lost_the_second_doubled_and_the_first_delayed():
    rules = [
        delay_nth("activations", 1, by_s=5),
        duplicate_nth("activations", 2),
        drop_nth("activations", 3),
    ]
    network = Network(ScriptedFaults(rules))
    nano = network.sender()
    for payload in (b"1", b"2", b"3", b"4"):
        nano.publish(ACTIVATIONS, payload)
    assert network.payloads() == [b"2", b"2", b"4"]
    assert network.broker.next_due_s() == network.clock.monotonic_s() + 5
    network.clock.advance(4.9)
    assert network.payloads() == []
    network.clock.advance(0.1)
    assert network.payloads() == [b"1"]


def _fate_of_200(seed: int) -> list[bytes]:
    network = Network(RandomFaults(seed, drop=0.1, duplicate=0.1, delay=0.1, reorder=0.1))
    nano = network.sender()
    for number in range(200):
        nano.publish(ACTIVATIONS, number.to_bytes(1, "little"))
    return network.run_until_quiet()


def test_random_faults_do_everything_and_the_same_for_the_same_seed():
    arrived = _fate_of_200(seed=1)
    assert arrived == _fate_of_200(seed=1)
    assert arrived != _fate_of_200(seed=2)
    assert 150 < len(set(arrived)) < 200, "some were lost"
    assert len(arrived) > len(set(arrived)), "some came twice"
    assert arrived != sorted(arrived), "some were overtaken"


def test_random_faults_can_be_kept_to_one_kind_and_spare_the_status():
    network = Network(RandomFaults(0, drop=1.0, kinds=frozenset({"activations"})))
    nano = network.connect("nano", will=WILL)
    nano.publish(ACTIVATIONS, b"lost")
    nano.publish(device_topic(NANO, "requests"), b"kept")
    assert network.payloads() == [b"online", b"kept"]
    network.broker.faults = RandomFaults(0, drop=1.0)
    nano.publish(Topic(STATUS.name), b"spared")
    nano.publish(device_topic(NANO, "requests"), b"lost")
    assert network.payloads() == [b"spared"]


def test_what_was_under_way_when_the_link_broke_never_arrives():
    network = Network(ScriptedFaults([delay_nth("activations", 1, by_s=5)]))
    nano = network.sender()
    nano.publish(ACTIVATIONS, b"slow")
    network.coordinator.lose_link()
    network.coordinator.reconnect()
    assert network.run_until_quiet() == []
