"""Each request of an agent is carried out once and answered, whatever the broker loses or repeats.

The agent numbers its calls (`OpenCalls`) and names the ones that wait too long in its
heartbeats. The coordinator notes per session which calls it has seen and what it answered
(`AnswerBook`): a call seen before is not carried out again, an answer that got lost is given
again, a call that never arrived is asked for. Nothing depends on the broker's own queues.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.errors import ProtocolError
from shared.protocol.messages import Answer, Call, Request, SessionId
from shared.protocol.topics import Topic

MAX_OPEN_CALLS = 64


@dataclass(slots=True)
class _OpenCall:
    topic: Topic
    request: Request
    asked_s: float


class OpenCalls:
    """The agent's side: calls that wait for their answers."""

    def __init__(self, session: SessionId) -> None:
        """Start a session without calls."""
        self.session = session
        self._next = 0
        self._open: dict[int, _OpenCall] = {}

    def new(self) -> Call:
        """Return the name of the next call."""
        call = Call(
            session=self.session,
            number=self._next,
            answered_below=min(self._open, default=self._next),
        )
        self._next += 1
        return call

    @property
    def has_room(self) -> bool:
        """Whether another call that brings a second one after it may be made.

        While one answer is missing the coordinator must keep all later ones, so calls end
        half-way to `MAX_OPEN_CALLS` from the oldest that is open; the other half is for those
        that follow from an answer.
        """
        return self._next - min(self._open, default=self._next) < MAX_OPEN_CALLS // 2

    def asked(self, topic: Topic, request: Request, now_s: float) -> None:
        """Note that ``request`` goes out now (again)."""
        self._open[request.call.number] = _OpenCall(topic, request, now_s)

    def answered(self, answer: Answer) -> bool:
        """Close the call of ``answer``; False for one that nobody waits for: a repeat."""
        call = answer.call
        if call is None or call.session != self.session:
            return False
        return self._open.pop(call.number, None) is not None

    def overdue(self, now_s: float, *, after_s: float) -> tuple[int, ...]:
        """Return the calls that have waited at least ``after_s`` seconds."""
        return tuple(n for n, c in sorted(self._open.items()) if now_s - c.asked_s >= after_s)

    def doubt(self) -> None:
        """Call everything that was asked so far overdue: the link it went over is no more."""
        for call in self._open.values():
            call.asked_s = -math.inf

    def find(self, number: int) -> tuple[Topic, Request] | None:
        """Return what was asked under ``number``, if it still waits."""
        found = self._open.get(number)
        return None if found is None else (found.topic, found.request)

    def forget(self) -> None:
        """Give up all open calls."""
        self._open.clear()


@dataclass(slots=True)
class _Given:
    topic: Topic
    answer: Answer
    given_s: float


@dataclass(slots=True)
class AnswerBook:
    """The coordinator's side, one per session: what was asked and what was answered."""

    _floor: int = 0
    _pending: dict[int, Call] = field(default_factory=dict)
    _given: dict[int, _Given] = field(default_factory=dict)

    def admit(self, call: Call) -> bool:
        """Return True for a call to carry out now, False for one seen before.

        Raises:
            ProtocolError: more calls open at once than any agent of ours has.
        """
        if (
            call.number - self._floor > MAX_OPEN_CALLS
            and call.answered_below < call.number - MAX_OPEN_CALLS
        ):
            raise ProtocolError(f"more than {MAX_OPEN_CALLS} calls open at once")
        if call.answered_below > call.number:
            raise ProtocolError("a call says that it was answered itself")
        self._forget_below(call.answered_below)
        if call.number < self._floor or call.number in self._pending or call.number in self._given:
            return False
        self._pending[call.number] = call
        return True

    def answer(self, topic: Topic, answer: Answer, now_s: float) -> None:
        """Note the answer of a pending call."""
        if answer.call is None:
            raise ProtocolError("an answer without a call")
        self._pending.pop(answer.call.number, None)
        self._given[answer.call.number] = _Given(topic, answer, now_s)

    @property
    def pending(self) -> tuple[Call, ...]:
        """The calls that were admitted and lack their answers: it is our turn."""
        return tuple(self._pending.values())

    def is_pending(self, call: Call) -> bool:
        """Tell whether the call was admitted and still lacks its answer."""
        return call.number in self._pending

    def repeat(
        self, awaiting: Sequence[int], now_s: float, *, after_s: float
    ) -> tuple[list[tuple[Topic, Answer]], list[int]]:
        """Return the answers to give again, and the calls that never arrived.

        An answer given less than ``after_s`` ago is still on its way and not repeated.
        """
        again: list[tuple[Topic, Answer]] = []
        missing: list[int] = []
        for number in awaiting:
            given = self._given.get(number)
            if given is not None and now_s - given.given_s >= after_s:
                given.given_s = now_s
                again.append((given.topic, given.answer))
            elif given is None and number not in self._pending and number >= self._floor:
                missing.append(number)
        return again, missing

    def doubt(self) -> None:
        """Give every answer again that is asked for, however lately it was given: a link broke."""
        for given in self._given.values():
            given.given_s = -math.inf

    def _forget_below(self, floor: int) -> None:
        if floor <= self._floor:
            return
        self._floor = floor
        self._pending = {n: call for n, call in self._pending.items() if n >= floor}
        self._given = {n: g for n, g in self._given.items() if n >= floor}
