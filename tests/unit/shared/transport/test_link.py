"""Messages over a transport: credit, limits, what cannot be read, and what is lost half-way."""

from __future__ import annotations

import os
import re

import pytest

from shared.errors import PacketLimitError
from shared.protocol import chunking, codec
from shared.protocol.messages import (
    Accepted,
    Call,
    DeviceId,
    Finished,
    Heartbeat,
    Leave,
    PieceBytes,
    RunId,
    SessionId,
)
from shared.protocol.tensors import TensorFrame
from shared.protocol.topics import (
    COORDINATOR_STATUS,
    Address,
    agent_filters,
    coordinator_filters,
    device_topic,
    run_topic,
)
from shared.transport.base import LinkDown, LinkUp, Will
from shared.transport.link import (
    STALLED_S,
    STRANGER_BYTES,
    LinkEvent,
    MessageLink,
    Received,
    StatusSeen,
    Unreadable,
)
from shared.transport.memory import DEFAULT_MAX_PAYLOAD_BYTES, Faults, MemoryBroker, MemoryTransport
from tests.support.fake_clock import FakeClock
from tests.support.faults import Rule, ScriptedFaults
from tests.support.wire_messages import plain

RUN, NANO, ORIN = RunId("run"), DeviceId("nano"), DeviceId("orin")
REQUESTS, COMMANDS = device_topic(NANO, "requests"), device_topic(NANO, "commands")
WEIGHTS = run_topic(RUN, NANO, "weights")
CALL = Call(session=SessionId("0" * 16), number=0)
MIB = 2**20


class Ends:
    """A coordinator's link and nano's, over one broker."""

    def __init__(
        self,
        *,
        faults: Faults | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        **limits: int,
    ) -> None:
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock, faults=faults, max_payload_bytes=max_payload_bytes)
        self.coordinator_transport = MemoryTransport(self.broker, name="coordinator")
        self.coordinator = MessageLink(self.coordinator_transport, self.clock, **limits)
        self.coordinator.start(coordinator_filters(RUN), timeout_s=1)
        self.nano_transport = MemoryTransport(self.broker, name="nano")
        self.nano = MessageLink(self.nano_transport, self.clock, **limits)
        self.nano.start(agent_filters(NANO), timeout_s=1)
        self.nano.admit(NANO)
        for link in (self.coordinator, self.nano):
            assert link.receive(0) == LinkUp()

    def exchange(self) -> list[LinkEvent]:
        """Let both ends take turns until nothing moves; return what came, at either end."""
        events: list[LinkEvent] = []
        while True:
            came = [self.nano.receive(0), self.coordinator.receive(0)]
            events += [event for event in came if event is not None]
            due_s = self.broker.next_due_s()
            if came == [None, None]:
                if due_s is None:
                    return events
                self.clock.advance_to(due_s)

    def raw(self, payload: bytes, device: DeviceId = NANO) -> list[LinkEvent]:
        """Send bytes as they are on a device's request topic."""
        self.nano_transport.publish(device_topic(device, "requests"), payload)
        return self.exchange()


def large(size: int) -> PieceBytes:
    data = TensorFrame("uint8", (size,), os.urandom(size))
    return PieceBytes(call=CALL, sha256="0" * 64, offset=0, data=data)


def credits_in(broker: MemoryBroker) -> int:
    kinds = [name.rsplit("/", 1)[-1] for name, _ in broker.traffic]
    return kinds.count("requests")


def test_a_small_message_arrives_as_it_was_in_one_packet():
    ends = Ends()
    ends.nano.send(REQUESTS, Leave(session=CALL.session, reason="done"))
    expected = Received(Address("requests", NANO), Leave(session=CALL.session, reason="done"))
    assert ends.exchange() == [expected]
    assert len(ends.broker.traffic) == 1


def test_five_mebibytes_wait_for_credit_and_arrive_whole():
    ends, message = Ends(), large(5 * MIB)
    ends.coordinator.send(WEIGHTS, message)
    assert len(ends.broker.traffic) == chunking.WINDOW_CHUNKS
    assert ends.coordinator.sending_to(NANO)
    (event,) = ends.exchange()
    assert isinstance(event, Received)
    assert event.address == Address("weights", NANO, RUN)
    assert plain(event.message) == plain(message)
    assert credits_in(ends.broker) == 5, "20 chunks and a little, one word for every four"
    assert not ends.coordinator.sending_to(NANO)


def test_two_large_messages_share_the_way_and_both_arrive():
    ends = Ends()
    messages = [large(3 * MIB), large(4 * MIB)]
    for message in messages:
        ends.coordinator.send(WEIGHTS, message)
    found = [plain(e.message) for e in ends.exchange() if isinstance(e, Received)]
    assert sorted(found, key=repr) == sorted(map(plain, messages), key=repr)


def test_a_large_message_of_a_device_gets_its_credit_on_the_commands():
    ends, message = Ends(), large(3 * MIB)
    ends.coordinator.admit(NANO)
    ends.nano.send(run_topic(RUN, NANO, "adapter"), message)
    assert [type(event) for event in ends.exchange()] == [Received]
    assert {n for n, _ in ends.broker.traffic if n.endswith("commands")} == {COMMANDS.name}


def test_no_packet_is_larger_than_the_broker_takes():
    ends = Ends(max_payload_bytes=20_000)
    ends.coordinator.send(WEIGHTS, large(300_000))
    (event,) = ends.exchange()
    assert isinstance(event, Received)
    assert max(len(p) for _, p in ends.broker.traffic) <= 20_000


def test_a_broker_that_takes_too_little_is_refused_at_the_start():
    with pytest.raises(PacketLimitError, match="raise its max_packet_size"):
        Ends(max_payload_bytes=1000)


def lose(kind: str, *nths: int) -> ScriptedFaults:
    return ScriptedFaults([Rule(lambda p: p.kind == kind, (), nth) for nth in nths])


def test_a_lost_credit_is_made_good_by_the_next():
    ends, message = Ends(faults=lose("requests", 1)), large(5 * MIB)
    ends.coordinator.send(WEIGHTS, message)
    (event,) = ends.exchange()
    assert isinstance(event, Received)
    assert plain(event.message) == plain(message)


def test_a_transfer_whose_credits_are_all_lost_is_given_up_so_that_it_can_be_repeated():
    ends = Ends(faults=lose("requests", 1, 2))
    ends.coordinator.send(WEIGHTS, large(5 * MIB))
    assert ends.exchange() == []
    ends.clock.advance(STALLED_S - 0.1)
    assert ends.coordinator.sending_to(NANO)
    ends.clock.advance(0.1)
    assert not ends.coordinator.sending_to(NANO)
    message = large(5 * MIB)
    ends.coordinator.send(WEIGHTS, message)
    (event,) = ends.exchange()
    assert isinstance(event, Received)
    assert plain(event.message) == plain(message)


def test_credit_keeps_a_slow_transfer_alive():
    slow = ScriptedFaults([Rule(lambda p: p.kind == "requests", (STALLED_S * 0.9,), None)])
    ends = Ends(faults=slow)
    ends.coordinator.send(WEIGHTS, large(5 * MIB))
    began_s = ends.clock.monotonic_s()
    while (event := ends.nano.receive(0)) is None:
        ends.coordinator.receive(0)
        ends.coordinator.sending_to(NANO)  # the question gives up what stands still, not this
        ends.clock.advance(0.5)
        assert ends.clock.monotonic_s() < began_s + 10 * STALLED_S
    assert isinstance(event, Received)
    assert ends.clock.monotonic_s() > began_s + STALLED_S


def test_a_lost_link_drops_what_waits_for_credit():
    ends = Ends()
    ends.coordinator.send(WEIGHTS, large(5 * MIB))
    ends.coordinator_transport.lose_link()
    assert ends.coordinator.receive(0) == LinkDown("the link was cut")
    assert not ends.coordinator.sending_to(NANO)


def test_a_transfer_that_trickles_in_can_be_seen():
    ends = Ends()
    ends.coordinator.send(WEIGHTS, large(5 * MIB))
    assert not ends.nano.receiving_from(NANO, within_s=5)
    ends.nano_transport.publish(REQUESTS, b"")  # the broker is busy with something else too
    assert ends.nano.receive(0) is None
    assert ends.nano.receiving_from(NANO, within_s=5)
    ends.clock.advance(5)
    assert not ends.nano.receiving_from(NANO, within_s=5)


def test_a_lost_link_drops_what_is_half_here():
    ends = Ends()
    ends.coordinator.send(WEIGHTS, large(5 * MIB))
    assert ends.nano.receive(0) is None
    assert ends.nano.receiving_from(NANO, within_s=5)
    ends.nano_transport.lose_link()
    assert ends.nano.receive(0) == LinkDown("the link was cut")
    assert not ends.nano.receiving_from(NANO, within_s=5)


def test_what_is_half_sent_or_received_of_a_device_that_is_gone_is_forgotten():
    ends = Ends()
    ends.coordinator.send(WEIGHTS, large(5 * MIB))
    ends.coordinator.forget(NANO)
    assert not ends.coordinator.sending_to(NANO)
    assert ends.nano.receive(0) is None
    ends.nano.forget(NANO)
    assert not ends.nano.receiving_from(NANO, within_s=5)


def test_a_stranger_may_send_enough_to_join_and_no_more():
    ends = Ends()
    small = Leave(session=CALL.session, reason="x" * 4096)
    ends.nano.send(REQUESTS, small)
    ends.nano.send(REQUESTS, large(STRANGER_BYTES))
    first, *refused = ends.exchange()
    assert isinstance(first, Received)
    assert refused
    for event in refused:
        assert isinstance(event, Unreadable)
        assert "over the limit of 262144" in event.reason
    ends.coordinator.admit(NANO)
    ends.nano.send(REQUESTS, large(STRANGER_BYTES))
    (event,) = ends.exchange()
    assert isinstance(event, Received)


def test_one_strangers_limit_is_not_anothers():
    ends = Ends()
    ends.coordinator.admit(ORIN)
    ends.nano.send(REQUESTS, large(STRANGER_BYTES))
    assert all(isinstance(event, Unreadable) for event in ends.exchange())


def test_even_an_admitted_device_cannot_send_more_than_the_limit():
    ends = Ends(max_message_bytes=MIB)
    ends.coordinator.admit(NANO)
    ends.nano.send(REQUESTS, large(MIB))
    events = ends.exchange()
    assert events
    assert all(isinstance(event, Unreadable) for event in events)


def chunk_of(payload: bytes, transfer: int = 1) -> bytes:
    (chunk,) = chunking.cut(payload, transfer=transfer, size=chunking.CHUNK_BYTES)
    return chunk


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"garbage", "not a chunk: 7 bytes"),
        (bytes(100), "wrong first bytes"),
        (chunk_of(b"garbage of a message"), "wrong first bytes"),
        (chunk_of(codec.encode(Accepted(call=CALL))[:-64]), "not a message|header of"),
    ],
)
def test_unreadable_bytes_are_reported_with_their_sender_and_change_nothing(payload, says):
    ends = Ends()
    half, rest = chunking.cut(
        codec.encode(Leave(session=CALL.session, reason="x" * 2000)), transfer=7, size=1100
    )
    assert ends.raw(half) == []
    (event,) = ends.raw(payload)
    assert isinstance(event, Unreadable)
    assert event.address == Address("requests", NANO)
    assert not event.version_mismatch
    assert re.search(says, event.reason)
    (event,) = ends.raw(rest)
    assert isinstance(event, Received), "what was half received is still whole"


@pytest.mark.parametrize("layer", ["chunk", "message"])
def test_another_major_version_is_told_apart_from_garbage(layer):
    payload = bytearray(codec.encode(Accepted(call=CALL)))
    if layer == "message":
        payload[2] = 2
    chunk = bytearray(chunk_of(bytes(payload)))
    if layer == "chunk":
        chunk[2] = 2
    (event,) = Ends().raw(bytes(chunk))
    assert isinstance(event, Unreadable)
    assert event.version_mismatch
    assert "version 2, this side speaks 1" in event.reason


def test_a_status_comes_as_its_plain_bytes_and_its_device():
    ends = Ends()
    status = device_topic(ORIN, "status")
    orin = MemoryTransport(ends.broker, name="orin", will=Will(status, b"on", b"x" * 9999))
    orin.start((), timeout_s=1)
    orin.vanish()
    assert ends.exchange() == [StatusSeen(ORIN, b"on"), StatusSeen(ORIN, b"x" * 4096)]
    ends.coordinator_transport.publish(COORDINATOR_STATUS, b"up")
    # Agents and coordinators both watch the coordinator's status.
    assert ends.exchange() == [StatusSeen(None, b"up"), StatusSeen(None, b"up")]


def test_what_is_on_no_topic_of_ours_is_passed_over():
    ends = Ends()
    ends.nano_transport.publish(device_topic(DeviceId("na no"), "requests"), b"x")
    assert ends.exchange() == []
    assert ends.coordinator.bytes_received.total() == 0


def test_bytes_are_counted_per_device_on_both_sides():
    ends = Ends()
    ends.nano.send(REQUESTS, Heartbeat(session=CALL.session))
    ends.coordinator.send(device_topic(ORIN, "commands"), Finished(reason="over"))
    ends.coordinator.send(WEIGHTS, large(3 * MIB))
    ends.exchange()
    sent = {name: 0 for name, _ in ends.broker.traffic}
    for name, payload in ends.broker.traffic:
        sent[name] += len(payload)
    assert ends.coordinator.bytes_received[NANO] == sent[REQUESTS.name]
    assert ends.coordinator.bytes_sent[NANO] == sent[WEIGHTS.name] >= 3 * MIB
    assert ends.coordinator.bytes_sent[ORIN] == sent[device_topic(ORIN, "commands").name]
    assert ends.nano.bytes_received[NANO] == sent[WEIGHTS.name]


def test_a_restarted_sender_is_not_taken_for_a_repeat():
    ends = Ends()
    ends.nano.send(REQUESTS, Heartbeat(session=CALL.session))
    again = MessageLink(ends.nano_transport, ends.clock)
    again.start(agent_filters(NANO), timeout_s=1)
    again.send(REQUESTS, Heartbeat(session=CALL.session))
    assert sum(isinstance(event, Received) for event in ends.exchange()) == 2
