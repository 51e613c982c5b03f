"""Every call is carried out exactly once and answered, whatever the link does on the way."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.protocol.calls import MAX_OPEN_CALLS, AnswerBook, OpenCalls
from shared.protocol.messages import Accepted, Call, DeviceId, Ready, SessionId
from shared.protocol.topics import device_topic

SESSION = SessionId("0" * 16)
REQUESTS = device_topic(DeviceId("nano"), "requests")
COMMANDS = device_topic(DeviceId("nano"), "commands")
PATIENCE_S = 5.0


class Talk:
    """An agent's calls, a coordinator's book, and a link between them that a test moves."""

    def __init__(self) -> None:
        self.calls = OpenCalls(SESSION)
        self.book = AnswerBook()
        self.now_s = 0.0
        self.requests: list[Ready] = []
        self.answers: list[Accepted] = []
        self.resends: list[tuple[int, ...]] = []
        self.admitted: list[Call] = []
        self.carried_out: Counter[int] = Counter()
        self.answered: Counter[int] = Counter()
        self.asked = 0

    # --- the agent ---

    def ask(self) -> None:
        if self.calls.has_room:
            request = Ready(call=self.calls.new())
            self.calls.asked(REQUESTS, request, self.now_s)
            self.requests.append(request)
            self.asked += 1

    def take_answer(self, which: int, *, keep: bool = False) -> None:
        if self.answers:
            place = which % len(self.answers)
            answer = self.answers[place] if keep else self.answers.pop(place)
            if self.calls.answered(answer):
                self.answered[answer.call.number] += 1

    def take_resend(self, which: int) -> None:
        if self.resends:
            for number in self.resends.pop(which % len(self.resends)):
                found = self.calls.find(number)
                if found is not None:
                    topic, request = found
                    self.calls.asked(topic, request, self.now_s)
                    self.requests.append(request)

    # --- the coordinator ---

    def take_request(self, which: int, *, keep: bool = False) -> None:
        if self.requests:
            place = which % len(self.requests)
            request = self.requests[place] if keep else self.requests.pop(place)
            if self.book.admit(request.call):
                self.carried_out[request.call.number] += 1
                self.admitted.append(request.call)

    def answer(self, which: int) -> None:
        if self.admitted:
            call = self.admitted.pop(which % len(self.admitted))
            assert self.book.is_pending(call)
            answer = Accepted(call=call)
            self.book.answer(COMMANDS, answer, self.now_s)
            self.answers.append(answer)

    def heartbeat(self) -> None:
        self.now_s += PATIENCE_S
        awaiting = self.calls.overdue(self.now_s, after_s=PATIENCE_S)
        again, missing = self.book.repeat(awaiting, self.now_s, after_s=PATIENCE_S)
        self.answers += [answer for _, answer in again]
        if missing:
            self.resends.append(tuple(missing))

    # --- the link ---

    def lose(self, which: int) -> None:
        queues = [q for q in (self.requests, self.answers, self.resends) if q]
        if queues:
            queue = queues[which % len(queues)]
            queue.pop(which // 3 % len(queue))

    def act(self, action: str, which: int) -> None:
        if action == "ask":
            self.ask()
        elif action == "heartbeat":
            self.heartbeat()
        elif action.startswith("repeat"):
            getattr(self, action.removeprefix("repeat "))(which, keep=True)
        else:
            getattr(self, action)(which)

    def settle(self) -> None:
        """Let everything arrive from now on, until no call waits."""
        for _ in range(3):
            while self.requests or self.admitted or self.answers or self.resends:
                self.take_request(0)
                self.answer(0)
                self.take_answer(0)
                self.take_resend(0)
            self.heartbeat()
        assert self.calls.overdue(self.now_s + 100, after_s=0) == (), "somebody waits for ever"


ACTIONS = [
    "ask",
    "ask",
    "take_request",
    "take_request",
    "repeat take_request",
    "answer",
    "answer",
    "take_answer",
    "take_answer",
    "repeat take_answer",
    "take_resend",
    "heartbeat",
    "lose",
]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 50)), max_size=250))
def test_every_call_is_carried_out_once_and_answered_once(actions):
    talk = Talk()
    for action, which in actions:
        talk.act(action, which)
    talk.settle()
    once = dict.fromkeys(range(talk.asked), 1)
    assert talk.carried_out == once
    assert talk.answered == once


def test_while_one_answer_is_missing_there_is_an_end_to_what_is_asked():
    talk = Talk()
    talk.ask()
    talk.lose(0)  # the first request never arrives
    for _ in range(10 * MAX_OPEN_CALLS):
        talk.ask()
        talk.take_request(0)
        talk.answer(0)
        talk.take_answer(0)
    assert talk.asked < MAX_OPEN_CALLS, "the coordinator would have to keep all these answers"
    talk.settle()
    assert talk.calls.has_room
    assert set(talk.carried_out.values()) == {1}


def test_what_follows_from_an_answer_still_has_its_place():
    talk = Talk()
    while talk.calls.has_room:
        talk.ask()
    first, follow_up = talk.asked, OpenCalls(SESSION)
    assert first == MAX_OPEN_CALLS // 2
    for request in talk.requests:
        assert talk.book.admit(request.call)
    for _ in range(first):  # each opens a second call before the first is closed
        follow_up = talk.calls.new()
        talk.calls.asked(REQUESTS, Ready(call=follow_up), 0.0)
        assert talk.book.admit(follow_up)


def test_more_open_calls_than_any_agent_of_ours_makes_are_refused():
    book = AnswerBook()
    for number in range(MAX_OPEN_CALLS + 1):
        book.admit(Call(session=SESSION, number=number))
    with pytest.raises(ProtocolError, match="more than 64 calls open"):
        book.admit(Call(session=SESSION, number=MAX_OPEN_CALLS + 1))


def test_a_call_cannot_have_been_answered_before_it_was_made():
    book = AnswerBook()
    with pytest.raises(ProtocolError, match="answered itself"):
        book.admit(Call(session=SESSION, number=3, answered_below=4))
    assert book.admit(Call(session=SESSION, number=3)), "nothing was changed by the refusal"


def test_what_went_over_a_link_that_broke_is_overdue_on_both_sides():
    calls, book = OpenCalls(SESSION), AnswerBook()
    requests = [Ready(call=calls.new()) for _ in range(2)]
    for request in requests:
        calls.asked(REQUESTS, request, 10.0)
    book.admit(requests[0].call)
    answer = Accepted(call=requests[0].call)
    book.answer(COMMANDS, answer, 10.0)
    calls.doubt()
    book.doubt()
    awaiting = calls.overdue(10.0, after_s=PATIENCE_S)
    assert awaiting == (0, 1)
    assert book.repeat(awaiting, 10.0, after_s=PATIENCE_S) == ([(COMMANDS, answer)], [1])
    calls.asked(REQUESTS, requests[1], 10.0)
    assert calls.overdue(10.0, after_s=PATIENCE_S) == (0,), "that one is on its way again"
    assert book.repeat((0,), 10.0, after_s=PATIENCE_S) == ([], []), "so is its answer"


def test_an_answer_on_its_way_is_not_repeated_before_its_time():
    book, call = AnswerBook(), Call(session=SESSION, number=0)
    book.admit(call)
    answer = Accepted(call=call)
    book.answer(COMMANDS, answer, 10.0)
    assert book.repeat([0], 14.9, after_s=PATIENCE_S) == ([], [])
    assert book.repeat([0], 15.0, after_s=PATIENCE_S) == ([(COMMANDS, answer)], [])
    assert book.repeat([0], 19.9, after_s=PATIENCE_S) == ([], []), "given again at 15"


def test_answers_below_the_oldest_open_call_are_forgotten_and_never_asked_for():
    book = AnswerBook()
    first, second = Call(session=SESSION, number=0), Call(session=SESSION, number=1)
    for call in (first, second):
        book.admit(call)
        book.answer(COMMANDS, Accepted(call=call), 0.0)
    assert book.admit(Call(session=SESSION, number=2, answered_below=2))
    assert not book.admit(first), "a late repeat is not carried out again"
    assert book.repeat([0, 1], 100.0, after_s=PATIENCE_S) == ([], [])


def test_a_given_up_call_is_no_longer_pending():
    book, call = AnswerBook(), Call(session=SESSION, number=0)
    book.admit(call)
    book.admit(Call(session=SESSION, number=1, answered_below=1))
    assert not book.is_pending(call)


def test_answers_of_another_session_or_to_nothing_close_no_call():
    calls = OpenCalls(SESSION)
    request = Ready(call=calls.new())
    calls.asked(REQUESTS, request, 0.0)
    other = Call(session=SessionId("1" * 16), number=0)
    assert not calls.answered(Accepted(call=other))
    assert not calls.answered(Accepted(call=Call(session=SESSION, number=1)))
    assert calls.answered(Accepted(call=request.call))
    assert not calls.answered(Accepted(call=request.call)), "a repeat"


def test_an_answer_without_a_call_is_no_answer():
    from shared.protocol.messages import Finished

    with pytest.raises(ProtocolError, match="without a call"):
        AnswerBook().answer(COMMANDS, Finished(reason="over"), 0.0)
    assert not OpenCalls(SESSION).answered(Finished(reason="over"))
