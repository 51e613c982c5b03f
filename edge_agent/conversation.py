"""The agent's side of the talk with the coordinator: ask, wait, ask again, be alive.

A *script* is a generator that says what the device does, in order: it yields the calls whose
answers it waits for, and gets the first one that is answered. So a device's life reads from
top to bottom, and yet never blocks: the program (or a test with a clock of its own) drives it.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Generator
from typing import Literal, TypeAlias, TypeVar

from edge_agent.coordinator_watch import CoordinatorWatch
from shared.clock import Clock
from shared.errors import (
    HsplitError,
    NumericsError,
    PlanError,
    ProtocolError,
    RefusedError,
    VersionMismatchError,
)
from shared.protocol.calls import OpenCalls
from shared.protocol.messages import (
    Answer,
    Call,
    DeviceId,
    Finished,
    Heartbeat,
    Leave,
    Message,
    Refusal,
    Rejoin,
    Request,
    Resend,
    RunId,
    SessionId,
)
from shared.protocol.profile import Telemetry
from shared.protocol.topics import Topic, device_topic, run_topic
from shared.transport.base import LinkDown, LinkUp, Will
from shared.transport.link import LinkEvent, MessageLink, Received, StatusSeen, Unreadable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Waiting: TypeAlias = frozenset[int]
RequestKind: TypeAlias = Literal["requests", "activations", "adapter"]
Script: TypeAlias = Generator[Waiting, tuple[int, Answer], T]

HEARTBEAT_S = 2.0
REPEAT_AFTER_S = 5.0


class StaleError(HsplitError):
    """The coordinator went on without this device; it may take part in the next round."""


class RejoinNeededError(HsplitError):
    """The coordinator does not know this session: it was restarted, or gave the device up."""


class RunOverError(HsplitError):
    """The coordinator ended the run."""

    def __init__(self, finished: Finished) -> None:
        """Keep the message that said so."""
        super().__init__(finished.reason)
        self.finished = finished


_REFUSALS: dict[str, type[HsplitError]] = {
    "stale": StaleError,
    "outlier": StaleError,
    "bad_numbers": NumericsError,
    "bad_request": ProtocolError,
    "unreadable": ProtocolError,
    "version": VersionMismatchError,
    "does_not_fit": PlanError,
}


def refusal_error(refusal: Refusal) -> HsplitError:
    """Return the error that a refusal means for the device."""
    return _REFUSALS.get(refusal.code, RefusedError)(f"the coordinator refused: {refusal.reason}")


def new_instance() -> str:
    """Return the id of one start of the program: the first half of its session ids."""
    return secrets.token_hex(4)


def status_will(device_id: DeviceId, instance: str) -> Will:
    """Return birth and death notice: which start of the agent is online, or was."""
    return Will(
        device_topic(device_id, "status"),
        birth=json.dumps({"state": "online", "instance": instance}).encode(),
        death=json.dumps({"state": "offline", "instance": instance}).encode(),
    )


class Conversation:
    """Calls of one device and their answers, over one link. Belongs to the owner's thread."""

    def __init__(
        self,
        device_id: DeviceId,
        instance: str,
        link: MessageLink,
        clock: Clock,
        *,
        telemetry: Callable[[], Telemetry | None] = lambda: None,
    ) -> None:
        """Start without a session's calls.

        ``telemetry`` says how the device is, for the heartbeat that is about to be sent, or
        None if nothing is new. It must not raise; the pulse's thread calls it too.
        """
        self.device_id = device_id
        self.telemetry = telemetry
        self._instance = instance
        self._link = link
        self._clock = clock
        self._lives = 0
        self._run_id: RunId | None = None
        self._interrupt: HsplitError | None = None
        self._link_was_lost = False
        self._watch = CoordinatorWatch(clock)
        self._next_heartbeat_s = clock.monotonic_s()
        self.renew()

    def renew(self) -> None:
        """Begin a new session: earlier calls are void, and it is not in before `enter`."""
        self.live_session: SessionId | None = None
        """The session that is in; the pulse's thread reads it, so it is one attribute."""
        self._calls = OpenCalls(SessionId(f"{self._instance}{self._lives:08x}"))
        self._answers: dict[int, Answer] = {}
        self._lives += 1

    @property
    def session(self) -> SessionId:
        """The current session."""
        return self._calls.session

    def enter(self, run_id: RunId) -> None:
        """Be in: send heartbeats, and tensors on the topics of this run, from now on."""
        self._run_id = run_id
        self.live_session = self.session

    # --- for scripts --------------------------------------------------------------------------

    def post(self, make: Callable[[Call], Request], kind: RequestKind = "requests") -> int:
        """Send a request without waiting; return the number to wait for."""
        request = make(self._calls.new())
        if kind == "requests":
            topic = device_topic(self.device_id, kind)
        else:
            assert self._run_id is not None  # tensors are sent only after the welcome
            topic = run_topic(self._run_id, self.device_id, kind)
        self._ask(topic, request)
        return request.call.number

    @property
    def has_room(self) -> bool:
        """Whether more may be posted beside what is open; false until an old answer has come."""
        return self._calls.has_room

    def ask(self, make: Callable[[Call], Request], expected: type[T]) -> Script[T]:
        """Send a request and wait for its answer.

        Raises:
            ProtocolError: the answer is of another type.
        """
        answer = yield from self.ask_any(make)
        if not isinstance(answer, expected):
            raise ProtocolError(f"unexpected answer {type(answer).__name__} from the coordinator")
        return answer

    def ask_any(
        self, make: Callable[[Call], Request], kind: RequestKind = "requests"
    ) -> Script[Answer]:
        """Send a request and wait for its answer, whatever it is."""
        _, answer = yield frozenset({self.post(make, kind)})
        return answer

    # --- for the driver -----------------------------------------------------------------------

    def pump(self, timeout_s: float) -> bool:
        """Take one event from the link, waiting for it; send what is due. True if one came."""
        event = self._link.receive(timeout_s)
        if event is not None:
            self._handle(event)
        self._watch.tick()
        now = self._clock.monotonic_s()
        if now >= self._next_heartbeat_s:
            self._next_heartbeat_s = now + HEARTBEAT_S
            self._be_alive(self._overdue(now))
        return event is not None

    @property
    def next_due_s(self) -> float:
        """When `pump` has something to send though nothing arrives."""
        return self._next_heartbeat_s

    def take(self, waiting: Waiting) -> tuple[int, Answer] | None:
        """Return the first answer to one of ``waiting``, if there is one.

        Raises:
            HsplitError: the answer is a refusal, or the session or run has ended.
        """
        if self._interrupt is not None:
            error, self._interrupt = self._interrupt, None
            raise error
        for number in self._answers:
            if number in waiting:
                answer = self._answers.pop(number)
                if isinstance(answer, Refusal):
                    raise refusal_error(answer)
                return number, answer
        return None

    def forget_calls(self) -> None:
        """Give up all open calls; their answers, if they still come, are ignored."""
        self._calls.forget()
        self._answers.clear()

    def leave(self, reason: str) -> None:
        """Say goodbye, once, without waiting."""
        topic = device_topic(self.device_id, "requests")
        self._link.send_now(topic, Leave(session=self.session, reason=reason))

    def _ask(self, topic: Topic, request: Request) -> None:
        self._calls.asked(topic, request, self._clock.monotonic_s())
        self._link.send(topic, request)

    def _ask_again(self) -> None:
        """Name all that is open, at once: what was under way may have gone with a connection."""
        self._calls.doubt()
        self._next_heartbeat_s = self._clock.monotonic_s()

    def _overdue(self, now_s: float) -> tuple[int, ...]:
        # What is still trickling in over a slow link is not lost: asking for it makes it slower.
        if self._link.receiving_from(self.device_id, within_s=REPEAT_AFTER_S):
            return ()
        return self._calls.overdue(now_s, after_s=REPEAT_AFTER_S)

    def _be_alive(self, awaiting: tuple[int, ...]) -> None:
        # Before the welcome a heartbeat may overtake the request to join. The coordinator would
        # then say "join again", and that, were it late, would take us out of the midst of a round.
        if self.live_session is None:
            self._resend(awaiting)
            return
        topic = device_topic(self.device_id, "telemetry")
        self._link.send_now(
            topic,
            Heartbeat(session=self.live_session, awaiting=awaiting, telemetry=self.telemetry()),
        )

    def _handle(self, event: LinkEvent) -> None:
        if isinstance(event, Received):
            self._watch.heard()
            self._handle_message(event.message)
        elif isinstance(event, StatusSeen):
            if event.device is None:
                self._handle_status(event.payload)
        elif isinstance(event, LinkDown):
            logger.warning("link to the broker lost (%s), reconnecting", event.reason)
            self._link_was_lost = True
        elif isinstance(event, LinkUp):
            self._next_heartbeat_s = self._clock.monotonic_s()
            if self._link_was_lost:
                self._ask_again()
        elif isinstance(event, Unreadable):
            logger.warning("unreadable message on %s: %s", event.address.kind, event.reason)
            if event.version_mismatch:
                self._interrupt = VersionMismatchError(event.reason)

    def _handle_status(self, payload: bytes) -> None:
        seen = self._watch.status(payload)
        if seen is None:
            return
        if seen.state == "online":
            self._ask_again()  # it connected, perhaps again: it may have heard nothing of us
        elif seen.state == "finished" and seen.run_id == self._run_id:
            self._interrupt = RunOverError(Finished(reason="the run is complete"))

    def _handle_message(self, message: Message) -> None:
        if isinstance(message, Resend):
            if message.session == self.session:
                self._resend(message.numbers)
        elif isinstance(message, Rejoin):
            if message.session == self.session:
                self._interrupt = RejoinNeededError("the coordinator does not know this session")
        elif isinstance(message, Finished) and message.call is None:
            self._interrupt = RunOverError(message)
        elif isinstance(message, Refusal) and message.call is None:
            logger.warning("the coordinator could not use a message: %s", message.reason)
            # Once we are in, both sides have understood each other: somebody else wrote that.
            if message.code == "version" and self.live_session is None:
                self._interrupt = refusal_error(message)
        elif isinstance(message, Answer) and self._calls.answered(message):
            assert message.call is not None  # `answered` looked at it
            self._answers[message.call.number] = message

    def _resend(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            found = self._calls.find(number)
            if found is not None and not self._link.sending_to(self.device_id):
                logger.debug("repeating call %d, which is without an answer", number)
                self._ask(*found)


class Pulse:
    """A thread that says "I live" while the owner's thread computes for seconds on end."""

    def __init__(self, conversation: Conversation, link: MessageLink) -> None:
        """Take what to speak for; `start` begins."""
        self._conversation = conversation
        self._link = link
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End and wait for the thread."""
        self._stop.set()
        self._thread.join(timeout=2 * HEARTBEAT_S)

    def _run(self) -> None:
        topic = device_topic(self._conversation.device_id, "telemetry")
        while not self._stop.wait(HEARTBEAT_S):
            session = self._conversation.live_session
            if session is None:
                continue
            telemetry = self._conversation.telemetry()
            try:
                self._link.send_now(topic, Heartbeat(session=session, telemetry=telemetry))
            except HsplitError as error:
                logger.debug("heartbeat not sent: %s", error)
