"""Micro-batches that wait for the server's part of the model, and their turn.

A device may be one step ahead of the slowest; what belongs to the next step waits here until
the open one is closed. A device has at most its plan's number of micro-batches on the way, so
the queue is bounded; open graphs are bounded by ``max_open``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from coordinator.membership import StaleRequestError
from coordinator.registry import Member
from coordinator.rounds import MicroBatchDone, Round
from coordinator.server_training import (
    GradientResult,
    LossResult,
    MicroBatchInput,
    MicroBatchKey,
    ServerTrainer,
)
from shared.errors import HsplitError, NumericsError, ProtocolError
from shared.protocol.messages import (
    ActivationGradients,
    Activations,
    EvaluatedLoss,
    Hidden,
    HiddenGradients,
)

MAX_OPEN_MICRO_BATCHES = 64

Job: TypeAlias = Activations | HiddenGradients
Reply: TypeAlias = ActivationGradients | Hidden | EvaluatedLoss


@dataclass(frozen=True, slots=True)
class Done:
    """One job was carried out: the answer to give, the event for the round, and the loss in it."""

    member: Member
    reply: Reply
    event: MicroBatchDone | None = None
    loss_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """One job cannot be carried out, for this reason; nothing was changed."""

    member: Member
    job: Job
    error: HsplitError


@dataclass(frozen=True, slots=True)
class _Open:
    """What the server remembers of a micro-batch whose head is being computed on the device."""

    micro_batches: int
    target_tokens: int


@dataclass(frozen=True, slots=True)
class _Announced:
    """How many micro-batches a device's step has by its own word, and which of them came."""

    micro_batches: int
    indices: set[int] = field(default_factory=set)


class Exchange:
    """The queue in front of one `ServerTrainer`, for one round."""

    def __init__(self, trainer: ServerTrainer, round_: Round) -> None:
        """Start empty."""
        self._trainer = trainer
        self._round = round_
        self._queue: deque[tuple[Member, Job]] = deque()
        self._open: dict[tuple[str, int, int], _Open] = {}
        self._announced: dict[tuple[str, int], _Announced] = {}

    def submit(self, member: Member, job: Job) -> None:
        """Queue one request of a member.

        Raises:
            StaleRequestError: too late, or not of this round.
            ProtocolError: it contradicts the plan or the run's terms.
        """
        round_ = self._round
        if job.round != round_.number or member.device_id not in round_.participants:
            raise StaleRequestError(f"round {job.round} goes on without {member.device_id}")
        if isinstance(job, Activations):
            self._check(member, job)
        elif (member.device_id, job.step, job.micro_batch) not in self._open:
            raise ProtocolError(f"gradients of a micro-batch that is not open: {job.micro_batch}")
        self._queue.append((member, job))

    def drop(self, member: Member) -> None:
        """Forget everything of a member that is gone."""
        self._queue = deque(entry for entry in self._queue if entry[0] is not member)
        self._open = {k: v for k, v in self._open.items() if k[0] != member.device_id}
        self._announced = {k: v for k, v in self._announced.items() if k[0] != member.device_id}
        self._trainer.drop(member.device_id)

    def run_one(self) -> Done | Failed | None:
        """Carry out the first job whose turn it is; None where there is none.

        A job that cannot be carried out changes nothing and comes back as `Failed`.
        """
        for place, (member, job) in enumerate(self._queue):
            if self._is_due(job):
                del self._queue[place]
                try:
                    return self._carry_out(member, job)
                except (NumericsError, ProtocolError) as error:
                    self._forget(member, job)
                    return Failed(member, job, error)
        return None

    def _check(self, member: Member, job: Activations) -> None:
        plan = member.plan
        assert plan is not None  # participants have one
        if job.purpose == "evaluate":
            return
        if job.step < self._round.step:
            raise StaleRequestError(f"step {job.step} was closed without this micro-batch")
        if job.step > self._round.step + 1 or job.step >= self._round.end_step:
            raise ProtocolError(f"step {job.step} while step {self._round.step} is open")
        if job.micro_batches > plan.batch or job.micro_batch >= job.micro_batches:
            raise ProtocolError(f"micro-batch {job.micro_batch} of {job.micro_batches}")
        if len(job.lengths) > plan.micro_batch or job.target_tokens > sum(job.lengths):
            raise ProtocolError(
                f"{len(job.lengths)} sequences of {sum(job.lengths)} tokens, "
                f"{job.target_tokens} of them targets, in a micro-batch of {plan.micro_batch}"
            )
        self._announce(member, job)

    def _announce(self, member: Member, job: Activations) -> None:
        """Note a micro-batch: the round, which counts on that, must hear of each one once."""
        here = member.device_id, job.step
        step = self._announced.get(here, _Announced(job.micro_batches))
        if step.micro_batches != job.micro_batches:
            raise ProtocolError(
                f"step {job.step} has {job.micro_batches} micro-batches now, and had "
                f"{step.micro_batches} before"
            )
        if job.micro_batch in step.indices:
            raise ProtocolError(f"micro-batch {job.micro_batch} of step {job.step} came twice")
        step.indices.add(job.micro_batch)
        now = self._round.step
        self._announced = {k: v for k, v in self._announced.items() if k[1] >= now} | {here: step}

    def _forget(self, member: Member, job: Job) -> None:
        step = self._announced.get((member.device_id, job.step))
        if isinstance(job, Activations) and job.purpose == "train" and step is not None:
            step.indices.discard(job.micro_batch)

    def _is_due(self, job: Job) -> bool:
        if isinstance(job, HiddenGradients) or job.purpose == "evaluate":
            return True
        return job.step == self._round.step and len(self._open) < MAX_OPEN_MICRO_BATCHES

    def _carry_out(self, member: Member, job: Job) -> Done:
        if isinstance(job, HiddenGradients):
            return self._take_gradients(member, job)
        if job.purpose == "evaluate":
            return self._evaluate(member, job)
        return self._train(member, job)

    def _evaluate(self, member: Member, job: Activations) -> Done:
        result = self._trainer.evaluate(member.device_id, _input(member, job))
        if isinstance(result, LossResult):
            return Done(member, EvaluatedLoss(call=job.call, loss_sum=result.loss_sum))
        return Done(member, Hidden(call=job.call, hidden=result.hidden))

    def _train(self, member: Member, job: Activations) -> Done:
        key = MicroBatchKey(job.step, job.micro_batch)
        result = self._trainer.train(member.device_id, key, _input(member, job))
        if isinstance(result, GradientResult):
            answer = ActivationGradients(
                call=job.call, gradient=result.gradient, loss_sum=result.loss_sum
            )
            event = _done(member, job, job.micro_batches, job.target_tokens)
            return Done(member, answer, event, result.loss_sum)
        self._open[member.device_id, job.step, job.micro_batch] = _Open(
            job.micro_batches, job.target_tokens
        )
        return Done(member, Hidden(call=job.call, hidden=result.hidden))

    def _take_gradients(self, member: Member, job: HiddenGradients) -> Done:
        gradient = self._trainer.train_gradient(
            member.device_id, MicroBatchKey(job.step, job.micro_batch), job.gradient
        )
        opened = self._open.pop((member.device_id, job.step, job.micro_batch))
        answer = ActivationGradients(call=job.call, gradient=gradient, loss_sum=job.loss_sum)
        event = _done(member, job, opened.micro_batches, opened.target_tokens)
        return Done(member, answer, event, job.loss_sum)


def _done(member: Member, job: Job, of: int, target_tokens: int) -> MicroBatchDone:
    return MicroBatchDone(member.device_id, job.step, job.micro_batch, of, target_tokens)


def _input(member: Member, job: Activations) -> MicroBatchInput:
    assert member.plan is not None  # participants have one
    return MicroBatchInput(
        split_layer=member.plan.split_layer,
        lengths=job.lengths,
        hidden=job.hidden,
        labels=job.labels,
    )
