"""Joining, living, being lost: what a coordinator says to devices, over a broker in memory."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from coordinator.membership import (
    REPEAT_AFTER_S,
    Membership,
    StaleRequestError,
    refusal_code,
)
from coordinator.registry import Member, Stage
from shared.errors import NumericsError, PlanError, ProtocolError, StorageError
from shared.protocol.messages import (
    Accepted,
    Call,
    DeviceId,
    DeviceProfile,
    Finished,
    Heartbeat,
    JoinRequest,
    Leave,
    Message,
    PieceBytes,
    Ready,
    Refusal,
    Rejoin,
    Resend,
    RunId,
    SessionId,
    Welcome,
)
from shared.protocol.tensors import TensorFrame
from shared.protocol.topics import agent_filters, coordinator_filters, device_topic
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from shared.transport.base import LinkDown, LinkUp
from shared.transport.link import MessageLink, Received, StatusSeen, Unreadable
from shared.transport.memory import MemoryBroker, MemoryTransport
from tests.support.fake_clock import FakeClock
from tests.support.wire_samples import SAMPLES

RUN, NANO = RunId("run"), DeviceId("nano")
FIRST, SECOND = SessionId("00000001" + "0" * 8), SessionId("00000002" + "0" * 8)
LATER_LIFE = SessionId("00000001" + "0" * 7 + "1")
LOST_AFTER_S = 6.0
PROFILE = DeviceProfile(backend="torch", hsplit_version="0", sequences=3, evaluation_sequences=0)
TERMS = (TrainingTerms(total_steps=7), LoraTerms(r=2), OptimizerTerms())


class World:
    """The membership of a run, and the link of nano's agents."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        broker = MemoryBroker(self.clock)
        self.coordinator = self._link(broker, "coordinator")
        self.coordinator.start(coordinator_filters(RUN), timeout_s=1)
        self.nano_transport = MemoryTransport(broker, name="nano")
        self.nano = MessageLink(self.nano_transport, self.clock)
        self.nano.admit(NANO)
        self.nano.start(agent_filters(NANO), timeout_s=1)
        self.lost: list[Member] = []
        self.members = Membership(
            self.coordinator,
            self.clock,
            run_id=RUN,
            model=SAMPLES["welcome"].model,
            terms=TERMS,
            measure_at=lambda _: 4,
            lost_after_s=LOST_AFTER_S,
            on_lost=self.lost.append,
        )

    def _link(self, broker: MemoryBroker, name: str) -> MessageLink:
        return MessageLink(MemoryTransport(broker, name=name), self.clock)

    def say(self, message: Message, kind: str = "requests") -> list[Message]:
        """Let nano say something; return what it hears back."""
        self.nano.send(device_topic(NANO, kind), message)
        while (event := self.coordinator.receive(0)) is not None:
            if isinstance(event, Received):
                self.members.handle_other(event.address.device, event.message)
            elif isinstance(event, Unreadable):
                self.members.handle_unreadable(event)
        return self.heard()

    def heard(self) -> list[Message]:
        events = []
        while (event := self.nano.receive(0)) is not None:
            events.append(event)
        return [event.message for event in events if isinstance(event, Received)]

    def tick(self, seconds: float) -> list[Message]:
        self.clock.advance(seconds)
        self.members.tick()
        return self.heard()

    def beat(self, session: SessionId, *awaiting: int) -> list[Message]:
        return self.say(Heartbeat(session=session, awaiting=awaiting), "telemetry")

    def join(self, session: SessionId = FIRST, profile: DeviceProfile = PROFILE) -> list[Message]:
        return self.say(JoinRequest(call=Call(session=session, number=0), profile=profile))

    def member(self, session: SessionId = FIRST) -> Member:
        self.join(session)
        member = self.members.registry.find(NANO, session)
        assert member is not None
        return member


def types(messages: list[Message]) -> list[str]:
    return [message.type for message in messages]


def test_a_device_that_joins_is_told_the_run_its_model_and_its_terms():
    (welcome,) = World().join()
    assert welcome == Welcome(
        call=Call(session=FIRST, number=0),
        run_id=RUN,
        model=SAMPLES["welcome"].model,
        training=TERMS[0],
        lora=TERMS[1],
        optimizer=TERMS[2],
        measure_at=4,
    )


def test_a_member_may_send_large_messages():
    world = World()
    large = PieceBytes(
        call=Call(session=FIRST, number=1),
        sha256="0" * 64,
        offset=0,
        data=TensorFrame("uint8", (2**19,), bytes(2**19)),
    )
    assert "refusal" in types(world.say(large)), "a stranger may not"
    world.join()
    assert world.say(large) == []


def test_a_repeated_join_request_is_carried_out_once_and_answered_again():
    world = World()
    (welcome,) = world.join()
    first = world.members.registry.find(NANO, FIRST)
    assert world.join() == [], "the answer was given a moment ago"
    world.clock.advance(REPEAT_AFTER_S)
    assert world.join() == [welcome]
    assert world.members.registry.find(NANO, FIRST) is first
    world.tick(LOST_AFTER_S - 0.1)
    assert world.lost == [], "it was a sign of life"


def test_a_lost_answer_is_repeated_when_a_heartbeat_asks_for_it():
    world = World()
    (welcome,) = world.join()
    assert world.beat(FIRST, 0) == [], "it was given a moment ago"
    world.clock.advance(REPEAT_AFTER_S)
    assert world.beat(FIRST, 0) == [welcome]
    assert world.beat(FIRST) == []


def test_a_call_that_never_arrived_is_asked_for():
    world = World()
    world.join()
    assert world.beat(FIRST, 4, 6) == [Resend(session=FIRST, numbers=(4, 6))]


def test_a_call_under_way_is_neither_repeated_nor_asked_for():
    world = World()
    world.member().book.admit(Call(session=FIRST, number=1, answered_below=1))
    assert world.beat(FIRST, 1) == []


def send_half(world: World) -> None:
    """Let the first 8 of a message's 12 chunks arrive: the others wait for credit."""
    large = TensorFrame("uint8", (3 * 2**20,), bytes(3 * 2**20))
    half = PieceBytes(call=Call(session=FIRST, number=1), sha256="0" * 64, offset=0, data=large)
    world.nano.send(device_topic(NANO, "requests"), half)
    assert world.coordinator.receive(0) is None


def test_nothing_is_asked_for_while_something_is_still_coming_in():
    world = World()
    world.join()
    send_half(world)
    assert world.beat(FIRST, 1) == []
    world.nano.forget(NANO)
    world.clock.advance(REPEAT_AFTER_S)
    assert types(world.beat(FIRST, 1)) == ["resend"]


@pytest.mark.parametrize("speak", ["heartbeat", "request"])
def test_an_unknown_session_is_told_to_join_again(speak):
    world = World()
    if speak == "heartbeat":
        assert world.beat(FIRST) == [Rejoin(session=FIRST)]
    else:
        assert world.members.member_of(NANO, FIRST) is None
        assert world.heard() == [Rejoin(session=FIRST)]


def test_a_request_is_a_sign_of_life_and_noted_as_one():
    world = World()
    member = world.member()
    world.clock.advance(5.0)
    assert world.members.member_of(NANO, FIRST) is member
    assert member.asked_s == world.clock.monotonic_s()
    assert world.tick(LOST_AFTER_S - 0.1) == []
    assert world.lost == []


def test_a_heartbeat_keeps_a_member_but_is_no_request():
    world = World()
    member = world.member()
    asked_s = member.asked_s
    world.clock.advance(5.0)
    world.beat(FIRST)
    world.tick(5.0)
    assert world.lost == []
    assert member.asked_s == asked_s


def test_a_silent_member_is_struck_off_and_reported():
    world = World()
    member = world.member()
    world.tick(LOST_AFTER_S)
    assert world.lost == [member]
    assert world.beat(FIRST) == [Rejoin(session=FIRST)]


@pytest.mark.parametrize("said", ["onnxruntime 1.31.1, CUDAExecutionProvider 0", None])
def test_what_computes_there_is_in_the_log_and_of_an_older_agent_its_backend(said, caplog):
    with caplog.at_level(logging.INFO):
        World().join(profile=dataclasses.replace(PROFILE, computes_with=said))
    assert f"no accelerator, {said or 'torch'}, hsplit 0" in caplog.text


def test_a_member_that_leaves_is_reported_at_once_and_its_reason_logged(caplog):
    world = World()
    member = world.member()
    with caplog.at_level(logging.WARNING):
        world.say(Leave(session=FIRST, reason="battery low"))
    assert world.lost == [member]
    assert "nano is gone: battery low" in caplog.text


def test_a_member_that_has_done_all_leaves_without_a_warning(caplog):
    world = World()
    world.member().stage = Stage.DONE
    with caplog.at_level(logging.WARNING):
        world.say(Leave(session=FIRST, reason="done"))
    assert len(world.lost) == 1
    assert caplog.text == ""


def test_an_old_goodbye_does_not_strike_off_a_new_session():
    world = World()
    world.member(LATER_LIFE)
    world.say(Leave(session=FIRST, reason="late"))
    assert world.lost == []


# --- two agents with one id ---------------------------------------------------------------------


def test_a_second_agent_is_held_then_refused_when_the_first_speaks():
    world = World()
    world.join(FIRST)
    world.clock.advance(1.0)
    assert world.join(SECOND) == []
    assert world.beat(SECOND, 0) == [], "held: not told to join again"
    world.clock.advance(1.0)
    (refusal,) = world.beat(FIRST)
    assert isinstance(refusal, Refusal)
    assert refusal.call == Call(session=SECOND, number=0)
    assert refusal.code == "device_id_in_use"
    assert "another agent is connected as 'nano'" in refusal.reason
    assert world.lost == [], "the first goes on"


def test_a_request_that_may_have_been_on_its_way_does_not_decide_against_a_second_agent():
    world = World()
    world.join(FIRST)
    world.clock.advance(1.0)
    world.join(SECOND)
    world.clock.advance(1.0)
    assert world.members.member_of(NANO, FIRST) is not None
    assert world.beat(SECOND, 0) == [], "still held"
    assert types(world.tick(LOST_AFTER_S)) == ["welcome"]


def test_a_second_agent_takes_the_place_of_a_first_that_stays_silent():
    world = World()
    first = world.member(FIRST)
    world.clock.advance(1.0)
    world.join(SECOND)
    assert world.tick(LOST_AFTER_S - 1.1) == []
    (welcome,) = world.tick(0.1)
    assert isinstance(welcome, Welcome)
    assert welcome.call.session == SECOND
    assert world.lost == [first]


def test_an_agent_that_joins_again_replaces_itself_at_once():
    world = World()
    first = world.member(FIRST)
    (welcome,) = world.join(LATER_LIFE)
    assert isinstance(welcome, Welcome)
    assert world.lost == [first]
    world.clock.advance(REPEAT_AFTER_S)
    assert world.join(FIRST) == [], "a late repeat of its first request changes nothing"
    assert world.members.registry.find(NANO, LATER_LIFE) is not None


# --- birth and death ----------------------------------------------------------------------------


def status(**content: object) -> StatusSeen:
    return StatusSeen(NANO, json.dumps(content).encode())


def test_a_death_notice_shortens_the_wait():
    world = World()
    world.join()
    world.members.handle_status(status(state="offline", instance=FIRST[:8]))
    world.tick(1.9)
    assert world.lost == []
    world.tick(0.1)
    assert len(world.lost) == 1


def test_what_a_device_was_told_over_an_earlier_connection_is_told_again_at_once():
    world = World()
    (welcome,) = world.join()
    assert world.beat(FIRST, 0) == [], "it was given a moment ago"
    world.members.handle_status(status(state="online", instance=SECOND[:8]))
    assert world.beat(FIRST, 0) == [], "another start of the device is not this one"
    world.members.handle_status(status(state="online", instance=FIRST[:8]))
    assert world.beat(FIRST, 0) == [welcome]


def test_what_was_half_here_when_a_device_connected_anew_is_not_waited_for():
    world = World()
    world.join()
    send_half(world)
    world.nano_transport.lose_link()
    assert isinstance(world.nano.receive(0), LinkDown)
    world.nano_transport.reconnect()
    assert world.nano.receive(0) == LinkUp()
    world.members.handle_status(status(state="online", instance=FIRST[:8]))
    assert types(world.beat(FIRST, 1)) == ["resend"]


NO_NOTICE = [
    status(state="online", instance=FIRST[:8]),
    status(state="offline", instance=SECOND[:8]),
    status(state="offline"),
    StatusSeen(None, b'{"state": "offline", "instance": "00000001"}'),
    StatusSeen(NANO, b""),
    StatusSeen(NANO, b"offline"),
    StatusSeen(NANO, b"[1, 2]"),
    StatusSeen(NANO, b'"offline"'),
    StatusSeen(NANO, b"\xff\xfe"),
    StatusSeen(NANO, b"[" * 4096),
    StatusSeen(NANO, b'{"a":' * 800),
]


@pytest.mark.parametrize("event", NO_NOTICE, ids=lambda event: repr(event.payload[:30]))
def test_any_other_status_changes_nothing(event):
    world = World()
    world.join()
    world.members.handle_status(event)
    world.tick(LOST_AFTER_S - 0.1)
    assert world.lost == []


# --- answers ------------------------------------------------------------------------------------


def admitted(world: World, number: int) -> tuple[Member, Call]:
    member = world.member()
    call = Call(session=FIRST, number=number, answered_below=number)
    assert member.book.admit(call)
    world.heard()
    return member, call


def test_an_answer_is_given_once():
    world = World()
    member, call = admitted(world, 1)
    world.members.answer(member, Accepted(call=call))
    world.members.answer(member, Accepted(call=call))
    assert world.heard() == [Accepted(call=call)]


def test_a_call_that_the_device_gave_up_gets_no_answer():
    world = World()
    member, call = admitted(world, 1)
    member.book.admit(Call(session=FIRST, number=2, answered_below=2))
    world.members.answer(member, Accepted(call=call))
    assert world.heard() == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hidden", "gradients"),
        ("activation_gradients", "gradients"),
        ("evaluated_loss", "gradients"),
        ("round_start", "handback"),
        ("piece_bytes", "weights"),
        ("graphs", "commands"),
        ("assignment", "commands"),
        ("accepted", "commands"),
        ("refusal", "commands"),
        ("finished", "commands"),
    ],
)
def test_every_kind_of_answer_has_its_topic(name, kind):
    world = World()
    member, call = admitted(world, 1)
    world.members.answer(member, dataclasses.replace(SAMPLES[name], call=call))
    event = world.nano.receive(0)
    assert isinstance(event, Received)
    assert event.message.type == name
    assert event.address.kind == kind
    assert event.address.run == (None if kind == "commands" else RUN)


def test_everybody_is_told_of_the_end():
    world = World()
    world.join()
    world.members.say_finished("the operator stopped it", failed=True)
    assert world.heard() == [Finished(reason="the operator stopped it", failed=True)]


# --- what should not come -----------------------------------------------------------------------


@pytest.mark.parametrize(("mismatch", "code"), [(False, "unreadable"), (True, "version")])
def test_unreadable_bytes_are_answered_to_their_sender(mismatch, code, caplog):
    world = World()
    payload = bytearray(b"hc\x01" + bytes(100))
    if mismatch:
        payload[2] = 9
    world.nano_transport.publish(device_topic(NANO, "requests"), bytes(payload))
    event = world.coordinator.receive(0)
    event = event if isinstance(event, Unreadable) else world.coordinator.receive(0)
    assert isinstance(event, Unreadable)
    world.members.handle_unreadable(event)
    (refusal,) = world.heard()
    assert refusal == Refusal(code=code, reason=event.reason)
    assert "nano sent something unreadable" in caplog.text
    assert len(world.members.registry) == 0


def test_what_only_a_coordinator_may_say_is_logged_and_changes_nothing(caplog):
    world = World()
    world.join()
    assert world.say(Finished(reason="ha")) == []
    assert "which only a coordinator may" in caplog.text
    assert world.lost == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StaleRequestError("x"), "stale"),
        (NumericsError("x"), "bad_numbers"),
        (PlanError("x"), "does_not_fit"),
        (ProtocolError("x"), "bad_request"),
        (StorageError("x"), "bad_request"),
    ],
)
def test_every_error_has_its_word_on_the_wire(error, code):
    assert refusal_code(error) == code


def test_a_request_of_a_stranger_makes_no_member():
    world = World()
    assert world.say(Ready(call=Call(session=FIRST, number=0))) == []
    assert len(world.members.registry) == 0
