"""A step on the device, script and coordinator played by hand: what is sent, kept and added up."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent import local_training
from edge_agent.backends.base import NO_TARGET, MicroBatch, TokenBatch
from edge_agent.conversation import Conversation, StaleError
from edge_agent.local_training import LossSum, Work
from shared.errors import ProtocolError
from shared.protocol.calls import MAX_OPEN_CALLS
from shared.protocol.messages import (
    Accepted,
    ActivationGradients,
    Activations,
    DeviceId,
    EvaluatedLoss,
    Hidden,
    HiddenGradients,
    Refusal,
    Request,
    RunId,
)
from shared.protocol.tensors import pack, unpack
from shared.protocol.topics import agent_filters, coordinator_filters, device_topic, run_topic
from shared.transport.link import MessageLink, Received
from shared.transport.memory import MemoryBroker, MemoryTransport
from tests.support.fake_clock import FakeClock

RUN, NANO = RunId("run"), DeviceId("nano")


def batch(index: int) -> TokenBatch:
    """Return two sequences of 2 and 1 tokens, of which 2 are targets."""
    ids = np.array([index, index + 1, index + 2], np.int32)
    return TokenBatch(ids, np.array([NO_TARGET, 7, 8], np.int32), (2, 1))


class Doubling:
    """A backend whose front doubles token ids and whose head's loss is the sum of what it gets.

    It has no weights; it notes what it is asked, and refuses what it was not prepared for.
    """

    name = "doubling"
    accelerator = None

    def __init__(self) -> None:
        self.kept: dict[MicroBatch, TokenBatch] = {}
        self.backwards: dict[MicroBatch, float] = {}
        self.trained: list[bool] = []

    def forward(self, key, batch, *, train):
        assert key not in self.kept
        self.kept[key] = batch
        self.trained.append(train)
        return pack(2.0 * batch.input_ids[:, None], "float32")

    def backward(self, key, gradient):
        del self.kept[key]
        self.backwards[key] = float(unpack(gradient).sum())

    def head(self, key, hidden, *, train):
        values = unpack(hidden)
        return float(values.sum()), pack(values / 2) if train else None

    def whole(self, key, batch, *, train):
        self.trained.append(train)
        return float(batch.input_ids.sum())


class Step:
    """One script under way, and the coordinator that answers its calls in any order."""

    def __init__(self, batches=3, *, in_flight=2, purpose="train", labels="device", alone=False):
        clock = FakeClock()
        broker = MemoryBroker(clock)
        self.coordinator = MessageLink(MemoryTransport(broker, name="coordinator"), clock)
        self.coordinator.start(coordinator_filters(RUN), timeout_s=1)
        link = MessageLink(MemoryTransport(broker, name="nano"), clock)
        link.start(agent_filters(NANO), timeout_s=1)
        self.conversation = Conversation(NANO, "0a0b0c0d", link, clock)
        self.conversation.enter(RUN)
        self.backend = Doubling()
        self.result: LossSum | None = None
        work = Work(
            round=3,
            step=12,
            purpose=purpose,
            batches=[batch(10 * i) for i in range(batches)],
            in_flight=in_flight,
            alone=alone,
            send_labels=labels == "server",
        )
        self.script = local_training.run(work, self.backend, self.conversation)
        self.open: list[Activations | HiddenGradients] = []
        self._go(None)

    def _go(self, answered) -> None:
        try:
            self.waiting = self.script.send(answered)
        except StopIteration as done:
            self.result = done.value
        while (event := self.coordinator.receive(0)) is not None:
            if isinstance(event, Received) and isinstance(event.message, Request):
                self.open.append(event.message)

    def answer(self, place: int, answer) -> None:
        """Answer an open call and let the device take it in."""
        request = self.open.pop(place)
        self.coordinator.send(run_topic(RUN, NANO, "gradients"), answer(request))
        self.take()

    def take(self) -> None:
        while self.conversation.pump(0):
            pass
        answered = self.conversation.take(self.waiting)
        assert answered is not None
        self._go(answered)


def hidden(request):
    return Hidden(call=request.call, hidden=pack(unpack(request.hidden) + 1))


def gradients(loss_sum=0.0):
    def answer(request):
        what = request.gradient if isinstance(request, HiddenGradients) else request.hidden
        return ActivationGradients(call=request.call, gradient=what, loss_sum=loss_sum)

    return answer


def test_with_labels_here_each_micro_batch_goes_out_comes_back_and_goes_out_again():
    step = Step(1)
    (request,) = step.open
    assert isinstance(request, Activations)
    assert (request.purpose, request.round, request.step) == ("train", 3, 12)
    assert (request.micro_batch, request.micro_batches, request.target_tokens) == (0, 1, 2)
    assert (request.lengths, request.labels) == ((2, 1), None)
    np.testing.assert_array_equal(unpack(request.hidden)[:, 0], [0, 2, 4])
    step.answer(0, hidden)
    (request,) = step.open
    assert isinstance(request, HiddenGradients)
    assert (request.round, request.step, request.micro_batch) == (3, 12, 0)
    assert request.purpose == "train"
    assert request.loss_sum == 1 + 3 + 5
    step.answer(0, gradients(9.0))
    assert step.result == LossSum(9.0, 2), "the coordinator's echo of the loss is not added"
    assert step.backend.backwards == {MicroBatch(12, 0): 4.5}


def test_with_labels_there_they_travel_and_the_loss_comes_back():
    step = Step(1, labels="server")
    (request,) = step.open
    np.testing.assert_array_equal(unpack(request.labels), [NO_TARGET, 7, 8])
    step.answer(0, gradients(2.5))
    assert step.result == LossSum(2.5, 2)


@pytest.mark.parametrize(
    ("labels", "answer", "nats"),
    [
        ("device", hidden, 9.0),
        ("server", lambda r: EvaluatedLoss(call=r.call, loss_sum=4.0), 4.0),
    ],
)
def test_an_evaluation_ends_with_the_loss_and_keeps_nothing(labels, answer, nats):
    step = Step(1, purpose="evaluate", labels=labels)
    assert step.open[0].purpose == "evaluate"
    step.answer(0, answer)
    assert step.result == LossSum(nats, 2)
    assert step.backend.trained == [False]
    assert step.backend.backwards == {}


def test_a_probe_goes_as_training_does_and_says_in_every_message_what_it_is():
    step = Step(1, purpose="probe")
    assert step.open[0].purpose == "probe"
    step.answer(0, hidden)
    assert isinstance(step.open[0], HiddenGradients)
    assert step.open[0].purpose == "probe"
    step.answer(0, gradients())
    assert step.result == LossSum(9.0, 2)
    assert step.backend.trained == [True]
    assert step.backend.backwards == {MicroBatch(12, 0): 4.5}


def test_no_more_are_on_their_way_than_allowed_and_the_order_changes_nothing():
    step = Step(5, in_flight=2)
    while step.result is None:
        assert len(step.open) <= 2
        last = len(step.open) - 1  # the younger one is answered first
        step.answer(last, hidden if isinstance(step.open[last], Activations) else gradients())
    expected = sum(3 * (20 * i + 3) for i in range(5))  # of 2 x (10 i + 0, 1, 2) + 1 each
    assert step.result == LossSum(expected, 10)
    assert sorted(key.index for key in step.backend.backwards) == [0, 1, 2, 3, 4]
    assert step.backend.kept == {}


def test_while_one_answer_is_lost_the_device_stops_before_the_coordinator_must_refuse():
    step = Step(3 * MAX_OPEN_CALLS, in_flight=2, purpose="evaluate")
    lost = step.open[0]
    while len(step.open) > 1:
        step.answer(1, hidden)
    assert step.open == [lost]
    assert MAX_OPEN_CALLS // 4 < len(step.backend.trained) < MAX_OPEN_CALLS
    step.answer(0, hidden)  # it was repeated, and all goes on
    while step.result is None:
        step.answer(0, hidden)
    assert step.result.target_tokens == 2 * 3 * MAX_OPEN_CALLS


def test_nothing_goes_out_where_the_device_holds_everything():
    step = Step(2, alone=True)
    assert step.open == []
    assert step.result == LossSum(3.0 + 33.0, 4)
    assert step.backend.trained == [True, True]


def test_a_step_without_micro_batches_is_nothing():
    assert Step(0).result == LossSum()


def test_an_answer_that_belongs_to_something_else_makes_no_sense():
    with pytest.raises(ProtocolError, match="unexpected answer Accepted to activations"):
        Step(1).answer(0, lambda request: Accepted(call=request.call))


def test_a_refusal_of_one_micro_batch_ends_the_step():
    step = Step(3, in_flight=2)
    refusal = Refusal(call=step.open[1].call, code="stale", reason="too late")
    step.coordinator.send(device_topic(NANO, "commands"), refusal)
    with pytest.raises(StaleError, match="too late"):
        step.take()
