"""One step, evaluation or probe on the device, as scripts (`edge_agent.conversation`).

Several micro-batches may be on their way at once: while the coordinator works on one, the
device computes the next. Their order changes nothing (losses are sums).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edge_agent.backends.base import Backend, MicroBatch, TokenBatch
from edge_agent.conversation import Conversation, Script
from shared.class_counts import ClassCounts, total
from shared.errors import ProtocolError
from shared.protocol.messages import (
    ActivationGradients,
    Activations,
    Answer,
    EvaluatedLoss,
    Hidden,
    HiddenGradients,
)
from shared.protocol.tensors import pack

Purpose: TypeAlias = Literal["train", "evaluate", "probe"]
"""To learn; to know the held-out loss; to measure importance, which goes as training does."""


@dataclass(frozen=True, slots=True)
class LossSum:
    """A sum of losses in nats and the number of targets it is over.

    ``counts``: how the coordinator's classifier chose, where it evaluated.
    """

    nats: float = 0.0
    target_tokens: int = 0
    counts: ClassCounts = ()

    def __add__(self, other: LossSum) -> LossSum:
        """Return the sum over both."""
        return LossSum(
            self.nats + other.nats,
            self.target_tokens + other.target_tokens,
            total((self.counts, other.counts)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Which micro-batches of which round and step go out, and how.

    ``alone``: the device holds all blocks and the head, so nothing goes out at all.
    ``send_labels``: the head is on the server.
    """

    round: int
    step: int
    purpose: Purpose
    batches: Sequence[TokenBatch]
    in_flight: int
    alone: bool
    send_labels: bool

    @property
    def goes_back(self) -> bool:
        """Whether gradients come back through the front."""
        return self.purpose != "evaluate"


def run(work: Work, backend: Backend, conversation: Conversation) -> Script[LossSum]:
    """Carry out all micro-batches of ``work``; return their summed loss.

    To train, the backend then holds the summed gradients, ready for its `step`. To probe,
    it was told so before (`Backend.begin_probe`), and then holds what it measured.
    """
    if work.alone:
        return _run_alone(work, backend)
    return (yield from _Exchange(work, backend, conversation).run())


def _run_alone(work: Work, backend: Backend) -> LossSum:
    loss = LossSum()
    for index, batch in enumerate(work.batches):
        key = MicroBatch(work.step, index)
        loss += LossSum(backend.whole(key, batch, train=work.goes_back), batch.target_tokens)
    return loss


@dataclass(slots=True)
class _Exchange:
    work: Work
    backend: Backend
    conversation: Conversation
    open: dict[int, MicroBatch] = field(default_factory=dict)
    total: LossSum = LossSum()

    def run(self) -> Script[LossSum]:
        waiting = iter(enumerate(self.work.batches))
        self._send_more(waiting)
        while self.open:
            number, answer = yield frozenset(self.open)
            self._take(self.open.pop(number), answer)
            self._send_more(waiting)
        return self.total

    def _send_more(self, waiting: Iterator[tuple[int, TokenBatch]]) -> None:
        while len(self.open) < self.work.in_flight and self.conversation.has_room:
            following = next(waiting, None)
            if following is None:
                return
            index, batch = following
            key = MicroBatch(self.work.step, index)
            self.total += LossSum(0.0, batch.target_tokens)
            self.open[self._send(key, batch)] = key

    def _send(self, key: MicroBatch, batch: TokenBatch) -> int:
        work = self.work
        hidden = self.backend.forward(key, batch, train=work.goes_back)
        labels = pack(batch.labels) if work.send_labels else None
        return self.conversation.post(
            lambda call: Activations(
                call=call,
                purpose=work.purpose,
                round=work.round,
                step=work.step,
                micro_batch=key.index,
                micro_batches=len(work.batches),
                target_tokens=batch.target_tokens,
                lengths=batch.lengths,
                hidden=hidden,
                labels=labels,
            ),
            kind="activations",
        )

    def _take(self, key: MicroBatch, answer: Answer) -> None:
        if isinstance(answer, Hidden):
            self._answer_head(key, answer)
        elif isinstance(answer, ActivationGradients):
            if self.work.send_labels:
                self.total += LossSum(answer.loss_sum)
            self.backend.backward(key, answer.gradient)
        elif isinstance(answer, EvaluatedLoss):
            self.total += LossSum(answer.loss_sum, counts=answer.counts)
        else:
            raise ProtocolError(f"unexpected answer {type(answer).__name__} to activations")

    def _answer_head(self, key: MicroBatch, answer: Hidden) -> None:
        work = self.work
        loss_sum, gradient = self.backend.head(key, answer.hidden, train=work.goes_back)
        self.total += LossSum(loss_sum)
        if gradient is None or work.purpose == "evaluate":
            return
        purpose = work.purpose
        number = self.conversation.post(
            lambda call: HiddenGradients(
                call=call,
                round=work.round,
                step=work.step,
                micro_batch=key.index,
                loss_sum=loss_sum,
                gradient=gradient,
                purpose=purpose,
            ),
            kind="activations",
        )
        self.open[number] = key
