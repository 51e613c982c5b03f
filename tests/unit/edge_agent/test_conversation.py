"""The agent's side of the talk: asking, repeating, and what each answer means for the device."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest

from edge_agent import conversation as module
from edge_agent.conversation import (
    HEARTBEAT_S,
    REPEAT_AFTER_S,
    Conversation,
    Pulse,
    RejoinNeededError,
    RunOverError,
    StaleError,
    new_instance,
    refusal_error,
    status_will,
)
from edge_agent.coordinator_watch import SILENCE_S
from shared.errors import (
    BrokerUnreachableError,
    NumericsError,
    PlanError,
    ProtocolError,
    RefusedError,
    VersionMismatchError,
)
from shared.protocol.messages import (
    Accepted,
    Activations,
    DeviceId,
    Finished,
    Heartbeat,
    Leave,
    Message,
    PieceBytes,
    Ready,
    Refusal,
    Rejoin,
    Resend,
    RunId,
    SessionId,
)
from shared.protocol.profile import Telemetry
from shared.protocol.tensors import TensorFrame
from shared.protocol.topics import (
    COORDINATOR_STATUS,
    agent_filters,
    coordinator_filters,
    device_topic,
    run_topic,
)
from shared.transport.base import LinkUp
from shared.transport.link import STALLED_S, MessageLink, Received
from shared.transport.memory import MemoryBroker, MemoryTransport
from tests.support.fake_clock import FakeClock
from tests.support.wire_samples import SAMPLES

RUN, NANO = RunId("run"), DeviceId("nano")
INSTANCE = "0a0b0c0d"
COMMANDS = device_topic(NANO, "commands")


class Talk:
    """A conversation, and the coordinator's link at the other end."""

    def __init__(
        self, *, is_in: bool = True, telemetry: Callable[[], Telemetry | None] = lambda: None
    ) -> None:
        self.clock = FakeClock()
        self.broker = MemoryBroker(self.clock)
        self.coordinator_transport = MemoryTransport(self.broker, name="coordinator")
        self.coordinator = MessageLink(self.coordinator_transport, self.clock)
        self.coordinator.admit(NANO)
        self.coordinator.start(coordinator_filters(RUN), timeout_s=1)
        self.transport = MemoryTransport(self.broker, name="nano")
        self.link = MessageLink(self.transport, self.clock)
        self.link.admit(NANO)
        self.link.start(agent_filters(NANO), timeout_s=1)
        self.nano = Conversation(NANO, INSTANCE, self.link, self.clock, telemetry=telemetry)
        if is_in:
            self.nano.enter(RUN)
        self.settle()

    def settle(self) -> list[Message]:
        """Let everything arrive at both ends; return what the coordinator got but heartbeats."""
        came: list[Message] = []
        while True:
            moved = self.nano.pump(0)
            event = self.coordinator.receive(0)
            if event is None and not moved:
                return [m for m in came if not isinstance(m, Heartbeat)]
            if isinstance(event, Received):
                came.append(event.message)

    def say(self, message: Message) -> None:
        self.coordinator.send(COMMANDS, message)
        self.settle()

    def ready(self) -> Ready:
        """Let nano ask; return the request as it arrived."""
        self.nano.post(lambda call: Ready(call=call))
        (request,) = self.settle()
        assert isinstance(request, Ready)
        return request

    def beats(self) -> list[tuple[int, ...]]:
        """Return what nano's heartbeats awaited since the last look."""
        return [beat.awaiting for beat in self.heartbeats()]

    def heartbeats(self) -> list[Heartbeat]:
        """Return nano's heartbeats since the last look."""
        self.nano.pump(0)
        found = []
        while (event := self.coordinator.receive(0)) is not None:
            if isinstance(event, Received) and isinstance(event.message, Heartbeat):
                found.append(event.message)
        return found


def test_a_request_goes_to_its_topic_and_its_answer_comes_back():
    talk = Talk()
    request = talk.ready()
    assert request.call.session == talk.nano.session
    answer = Accepted(call=request.call)
    talk.say(answer)
    assert talk.nano.take(frozenset({7})) is None, "nobody waits for that"
    assert talk.nano.take(frozenset({0})) == (0, answer)
    assert talk.nano.take(frozenset({0})) is None, "taken"


@pytest.mark.parametrize("kind", ["activations", "adapter"])
def test_tensors_go_to_the_topics_of_the_run(kind):
    talk = Talk()
    talk.nano.post(lambda call: SAMPLES["ready"], kind)
    names = [name for name, _ in talk.broker.traffic if "telemetry" not in name]
    assert names == [run_topic(RUN, NANO, kind).name]


def test_a_script_asks_and_gets_the_answer_it_expects():
    talk = Talk()
    script = talk.nano.ask(lambda call: Ready(call=call), Accepted)
    waiting = next(script)
    (request,) = talk.settle()
    talk.say(Accepted(call=request.call))
    with pytest.raises(StopIteration) as done:
        script.send(talk.nano.take(waiting))
    assert done.value.value == Accepted(call=request.call)


def test_an_answer_of_another_type_is_no_sense():
    talk = Talk()
    script = talk.nano.ask(lambda call: Ready(call=call), Accepted)
    waiting = next(script)
    (request,) = talk.settle()
    talk.say(Finished(call=request.call, reason="over"))
    with pytest.raises(ProtocolError, match="unexpected answer Finished"):
        script.send(talk.nano.take(waiting))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("device_id_in_use", RefusedError),
        ("does_not_fit", PlanError),
        ("bad_request", ProtocolError),
        ("bad_numbers", NumericsError),
        ("stale", StaleError),
        ("version", VersionMismatchError),
        ("unreadable", ProtocolError),
    ],
)
def test_every_refusal_is_an_error_that_says_why(code, error):
    talk = Talk()
    request = talk.ready()
    talk.say(Refusal(call=request.call, code=code, reason="not like this"))
    with pytest.raises(error, match="the coordinator refused: not like this") as raised:
        talk.nano.take(frozenset({0}))
    assert type(raised.value) is error
    assert talk.nano.take(frozenset({0})) is None


def test_a_refusal_of_a_later_minor_version_is_still_a_refusal():
    assert type(refusal_error(Refusal(code="mood", reason="x"))) is RefusedError  # type: ignore[arg-type]


# --- late, repeated, lost -----------------------------------------------------------------------


def test_answers_that_are_late_repeated_or_of_an_earlier_session_are_ignored():
    talk = Talk()
    request = talk.ready()
    talk.say(Accepted(call=request.call))
    assert talk.nano.take(frozenset({0})) is not None
    talk.say(Accepted(call=request.call))
    assert talk.nano.take(frozenset({0})) is None
    talk.nano.renew()
    talk.ready()
    talk.say(Accepted(call=request.call))
    assert talk.nano.take(frozenset({0})) is None


def test_calls_that_were_given_up_are_over():
    talk = Talk()
    first, second = talk.ready(), talk.ready()
    talk.say(Accepted(call=first.call))
    talk.nano.forget_calls()
    talk.say(Refusal(call=second.call, code="stale", reason="late"))
    assert talk.nano.take(frozenset({0, 1})) is None
    assert talk.ready().call.answered_below == 2, "the coordinator may forget them too"


def test_a_heartbeat_comes_in_time_and_names_what_waits_too_long():
    talk = Talk()
    talk.ready()
    assert talk.nano.next_due_s == talk.clock.monotonic_s() + HEARTBEAT_S
    talk.clock.advance(HEARTBEAT_S - 0.1)
    assert talk.beats() == []
    talk.clock.advance(0.1)
    assert talk.beats() == [()], "not yet overdue"
    talk.clock.advance(REPEAT_AFTER_S)
    assert talk.beats() == [(0,)]


def test_a_heartbeat_says_how_the_device_is_when_there_is_news_of_it():
    news = [Telemetry(temperature_c=60.0), None, Telemetry(temperature_c=61.0)]
    talk = Talk(is_in=False, telemetry=lambda: news.pop(0))
    talk.clock.advance(HEARTBEAT_S)
    assert talk.heartbeats() == []
    assert len(news) == 3, "no reading is lost before the welcome"
    talk.nano.enter(RUN)
    said = []
    for _ in range(3):
        talk.clock.advance(HEARTBEAT_S)
        said += [beat.telemetry for beat in talk.heartbeats()]
    assert said == [Telemetry(temperature_c=60.0), None, Telemetry(temperature_c=61.0)]


def test_before_its_welcome_a_device_says_nothing_but_its_request_again():
    talk = Talk(is_in=False)
    request = talk.ready()
    talk.clock.advance(REPEAT_AFTER_S - 0.1)
    assert talk.settle() == []
    talk.clock.advance(HEARTBEAT_S)
    assert talk.settle() == [request]
    assert talk.beats() == []
    talk.nano.enter(RUN)
    talk.clock.advance(HEARTBEAT_S)
    assert talk.beats() == [()]
    talk.nano.renew()
    talk.clock.advance(HEARTBEAT_S)
    assert talk.beats() == [], "a new session has to join first"


def test_nothing_is_called_lost_while_something_is_still_coming_in():
    talk = Talk()
    request = talk.ready()
    size = 3 * 2**20
    answer = PieceBytes(
        call=request.call,
        sha256="0" * 64,
        offset=0,
        data=TensorFrame("uint8", (size,), bytes(size)),
    )
    talk.clock.advance(REPEAT_AFTER_S)
    talk.coordinator.send(run_topic(RUN, NANO, "weights"), answer)
    talk.coordinator.forget(NANO)  # so the second half, which waits for credit, never comes
    assert talk.beats() == [()]
    talk.clock.advance(REPEAT_AFTER_S)
    assert talk.beats() == [(0,)]


def test_a_call_that_never_arrived_is_sent_again_as_it_was():
    talk = Talk()
    request = talk.ready()
    talk.coordinator.send(COMMANDS, Resend(session=talk.nano.session, numbers=(0,)))
    assert talk.settle() == [request]
    talk.clock.advance(HEARTBEAT_S)
    assert talk.beats() == [()], "its time counts from the repeat"


def test_an_answered_call_and_another_sessions_call_are_not_sent_again():
    talk = Talk()
    request = talk.ready()
    talk.coordinator.send(COMMANDS, Resend(session=SessionId("f" * 16), numbers=(0,)))
    assert talk.settle() == []
    talk.say(Accepted(call=request.call))
    talk.coordinator.send(COMMANDS, Resend(session=talk.nano.session, numbers=(0, 5)))
    assert talk.settle() == []


def activations(call):
    size = 3 * 2**20
    return Activations(
        call=call,
        purpose="train",
        round=1,
        step=0,
        micro_batch=0,
        micro_batches=1,
        target_tokens=1,
        lengths=(1,),
        hidden=TensorFrame("uint8", (size,), bytes(size)),
    )


def test_what_waits_for_credit_is_not_sent_twice_unless_the_credit_is_lost():
    talk = Talk()
    talk.nano.post(activations, "activations")
    while talk.coordinator.receive(0) is not None:
        pass
    talk.link.send_now(device_topic(NANO, "requests"), SAMPLES["rejoin"])  # not what it waits for
    sent = len(talk.broker.traffic)
    handle = talk.nano._handle_message
    handle(Resend(session=talk.nano.session, numbers=(0,)))
    assert len(talk.broker.traffic) == sent
    talk.clock.advance(STALLED_S)
    handle(Resend(session=talk.nano.session, numbers=(0,)))
    assert len(talk.broker.traffic) > sent
    assert [type(m) for m in talk.settle() if not isinstance(m, Rejoin)][:1] == [Activations]


# --- endings ------------------------------------------------------------------------------------


def test_a_session_that_is_unknown_must_join_again_and_an_old_word_of_it_is_void():
    talk = Talk()
    old = talk.nano.session
    talk.say(Rejoin(session=old))
    with pytest.raises(RejoinNeededError):
        talk.nano.take(frozenset())
    talk.nano.renew()
    assert talk.nano.session == SessionId(f"{INSTANCE}00000001") != old
    talk.say(Rejoin(session=old))
    assert talk.nano.take(frozenset()) is None


def test_the_end_of_the_run_ends_whatever_is_waited_for():
    talk = Talk()
    talk.ready()
    talk.say(Finished(reason="the operator stopped it", failed=True))
    with pytest.raises(RunOverError, match="the operator stopped it") as over:
        talk.nano.take(frozenset({0}))
    assert over.value.finished.failed


def test_the_end_as_an_answer_is_an_answer():
    talk = Talk()
    request = talk.ready()
    finished = Finished(call=request.call, reason="done")
    talk.say(finished)
    assert talk.nano.take(frozenset({0})) == (0, finished)


@pytest.mark.parametrize("code", ["unreadable", "version"])
@pytest.mark.parametrize("is_in", [False, True])
def test_bytes_unreadable_there_are_fatal_only_for_a_joiner_of_another_version(code, is_in, caplog):
    talk = Talk(is_in=is_in)
    talk.say(Refusal(code=code, reason="protocol version 1, this side speaks 2"))
    assert "could not use a message" in caplog.text
    if code == "version" and not is_in:
        with pytest.raises(VersionMismatchError, match="this side speaks 2"):
            talk.nano.take(frozenset())
    assert talk.nano.take(frozenset()) is None


@pytest.mark.parametrize("mismatch", [False, True])
def test_a_message_that_is_unreadable_here_is_fatal_only_for_another_version(mismatch, caplog):
    talk = Talk()
    stranger = MemoryTransport(talk.broker, name="stranger")
    stranger.start((), timeout_s=1)
    stranger.publish(COMMANDS, (b"hc\x02" if mismatch else b"xx\x01") + bytes(100))
    talk.settle()
    assert "unreadable message on commands" in caplog.text
    if mismatch:
        with pytest.raises(VersionMismatchError, match="chunk of protocol version 2"):
            talk.nano.take(frozenset())
    assert talk.nano.take(frozenset()) is None


def test_a_requests_message_that_arrives_here_is_no_answer():
    talk = Talk()
    talk.ready()
    talk.say(SAMPLES["ready"])
    assert talk.nano.take(frozenset({0})) is None


def test_leaving_says_so_once_with_the_session():
    talk = Talk()
    talk.nano.leave("stopped by Ctrl-C")
    assert talk.settle() == [Leave(session=talk.nano.session, reason="stopped by Ctrl-C")]


def test_after_a_lost_link_the_device_says_at_once_that_it_lives(caplog):
    talk = Talk()
    talk.transport.lose_link()
    talk.transport.reconnect()
    assert talk.beats() == []
    assert "link to the broker lost (the link was cut)" in caplog.text
    talk.nano.pump(0)
    assert talk.beats() == [()]


def test_after_a_lost_link_all_that_is_open_is_named_at_once():
    talk = Talk()
    talk.ready()
    talk.transport.lose_link()
    talk.transport.reconnect()
    talk.nano.pump(0)
    talk.nano.pump(0)
    assert talk.beats() == [(0,)]


def test_when_the_coordinator_is_back_all_that_is_open_is_named_at_once():
    talk = Talk()
    talk.ready()
    payload = json.dumps({"state": "online", "run_id": "run"}).encode()
    talk.coordinator_transport.publish(COORDINATOR_STATUS, payload)
    talk.nano.pump(0)
    assert talk.beats() == [(0,)]


@pytest.fixture
def told(caplog):
    """Return what the owner of the device was told of the coordinator since the last look."""
    caplog.set_level("INFO", logger="edge_agent.coordinator_watch")

    def since() -> list[str]:
        said = [r.getMessage() for r in caplog.records if "coordinator_watch" in r.name]
        caplog.clear()
        return said

    return since


def status(talk: Talk, **fields: str) -> None:
    talk.coordinator_transport.publish(COORDINATOR_STATUS, json.dumps(fields).encode())
    talk.settle()


def test_each_change_of_the_coordinators_state_is_told_once(told):
    talk = Talk(is_in=False)
    for _ in range(2):
        status(talk, state="online", run_id="run-1")
    assert told() == ["the coordinator is online (run run-1)"]
    for _ in range(2):
        status(talk, state="offline", run_id="run-1")
    assert told() == ["the coordinator is offline, waiting for it"]
    status(talk, state="online", run_id="run-2")
    assert told() == ["the coordinator is online (run run-2)"]


def test_one_that_was_away_at_the_end_hears_of_it_when_it_is_back(told):
    talk = Talk()
    status(talk, state="finished", run_id="run")
    with pytest.raises(RunOverError, match="the run is complete") as over:
        talk.nano.take(frozenset())
    assert not over.value.finished.failed
    assert told() == ["run run is complete"]


@pytest.mark.parametrize("is_in", [False, True])
def test_the_end_of_another_run_says_nothing_to_a_device(is_in):
    talk = Talk(is_in=is_in)
    status(talk, state="finished", run_id="another" if is_in else "run")
    assert talk.nano.take(frozenset()) is None


def test_a_broker_without_a_coordinator_is_told_once(told):
    talk = Talk(is_in=False)
    talk.clock.advance(SILENCE_S - 0.1)
    talk.settle()
    assert told() == []
    for _ in range(2):
        talk.clock.advance(SILENCE_S)
        talk.settle()
    assert told() == ["no coordinator at this broker yet, waiting"]


@pytest.mark.parametrize("sign", ["status", "answer"])
def test_after_a_sign_of_the_coordinator_its_silence_is_nothing_to_tell(told, sign):
    talk = Talk(is_in=False)
    if sign == "status":
        status(talk, state="online", run_id="run")
    else:
        talk.say(Accepted(call=talk.ready().call))
    told()
    talk.clock.advance(2 * SILENCE_S)
    talk.settle()
    assert told() == []


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"state": "online"}', b"\xff", b"[" * 4000])
def test_an_unreadable_status_of_the_coordinator_says_nothing(told, payload):
    talk = Talk(is_in=False)
    talk.coordinator_transport.publish(COORDINATOR_STATUS, payload)
    talk.settle()
    assert told() == []
    talk.clock.advance(SILENCE_S)
    talk.settle()
    assert told() == ["no coordinator at this broker yet, waiting"]


# --- starts -------------------------------------------------------------------------------------


def test_a_start_names_itself_in_its_sessions_and_in_its_status():
    instance = new_instance()
    assert instance != new_instance()
    talk = Talk()
    assert talk.nano.session == INSTANCE + "0" * 8
    will = status_will(NANO, INSTANCE)
    assert will.topic == device_topic(NANO, "status")
    assert json.loads(will.birth) == {"state": "online", "instance": INSTANCE}
    assert json.loads(will.death) == {"state": "offline", "instance": INSTANCE}


class Ear(MemoryTransport):
    """Wakes a test when something was published; the first publishing fails."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, name="nano")
        self.published = threading.Semaphore(0)
        self.failures = 1

    def publish(self, topic, payload):
        if self.failures:
            self.failures -= 1
            raise BrokerUnreachableError("not now")
        super().publish(topic, payload)
        self.published.release()


def test_the_pulse_speaks_only_for_a_session_that_is_in():
    talk = Talk()
    live = talk.nano.live_session
    assert live == talk.nano.session
    talk.nano.renew()
    assert talk.nano.live_session is None
    talk.nano.enter(RUN)
    assert talk.nano.live_session == talk.nano.session != live


def test_the_pulse_goes_on_while_the_owner_computes_and_stops_when_told(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.005)
    clock = FakeClock()
    broker = MemoryBroker(clock)
    ear = Ear(broker)
    coordinator = MessageLink(MemoryTransport(broker, name="coordinator"), clock)
    coordinator.start(coordinator_filters(RUN), timeout_s=1)
    link = MessageLink(ear, clock)
    link.start((), timeout_s=1)
    assert ear.receive(0) == LinkUp()
    reading = Telemetry(cpu_load_percent=12.5)
    nano = Conversation(NANO, INSTANCE, link, clock, telemetry=lambda: reading)
    nano.enter(RUN)
    pulse = Pulse(nano, link)
    before = threading.active_count()
    pulse.start()
    for _ in range(3):
        assert ear.published.acquire(timeout=10)
    pulse.stop()
    assert threading.active_count() == before
    assert coordinator.receive(0) == LinkUp()
    came = coordinator.receive(0)
    assert isinstance(came, Received)
    assert came.message == Heartbeat(session=nano.session, telemetry=reading)
