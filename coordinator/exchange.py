"""Micro-batches that wait for the server's part of the model, and their turn.

Three purposes: to train, which the round counts; to evaluate, which keeps nothing; and to probe
how important weights are, which keeps activations as training does but teaches nothing. A
device probes before its first step of the round.

A device may be one step ahead of the slowest; what belongs to the next step waits here until
the open one is closed. A device has at most its plan's number of micro-batches on the way, so
the queue is bounded; what keeps activations in memory is bounded by `ExchangeLimits`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from coordinator.back_pass import (
    GradientResult,
    LossResult,
    MicroBatchInput,
    MicroBatchKey,
    name_of,
)
from coordinator.membership import StaleRequestError
from coordinator.registry import Member
from coordinator.rounds import MicroBatchDone, Round
from coordinator.server_training import ServerTrainer
from coordinator.settings import CoordinatorSettings
from shared.errors import HsplitError, NumericsError, ProtocolError
from shared.protocol.messages import (
    ActivationGradients,
    Activations,
    DeviceId,
    EvaluatedLoss,
    Hidden,
    HiddenGradients,
)
from shared.protocol.tensors import TensorFrame, unpack

Job: TypeAlias = Activations | HiddenGradients
Reply: TypeAlias = ActivationGradients | Hidden | EvaluatedLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeLimits:
    """What a run allows: micro-batches open at once, sequences to evaluate at once, tokens.

    ``probe_sequences``: what each device was asked to probe in this round; 0: nothing.
    """

    open_micro_batches: int
    evaluate_batch: int
    max_length: int
    probe_sequences: int = 0

    @classmethod
    def of(cls, settings: CoordinatorSettings, *, probe_sequences: int) -> ExchangeLimits:
        """Return what a run's settings allow."""
        return cls(
            open_micro_batches=settings.devices.open_micro_batches,
            evaluate_batch=settings.training.evaluate_batch,
            max_length=settings.training.max_length,
            probe_sequences=probe_sequences,
        )


@dataclass(frozen=True, slots=True)
class Done:
    """One job was carried out: the answer to give, the event for the round, and the loss in it.

    ``trains``: it was part of a training step.
    """

    member: Member
    reply: Reply
    trains: bool = False
    event: MicroBatchDone | None = None
    loss_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """One job cannot be carried out, for this reason; nothing was changed."""

    member: Member
    job: Job
    error: HsplitError


@dataclass(frozen=True, slots=True)
class _Place:
    """Whose micro-batches, of which step, and to what end."""

    device: DeviceId
    step: int
    purpose: str


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

    def __init__(self, trainer: ServerTrainer, round_: Round, *, limits: ExchangeLimits) -> None:
        """Start empty."""
        self._trainer = trainer
        self._round = round_
        self._limits = limits
        self._queue: deque[tuple[Member, Job]] = deque()
        self._open: dict[tuple[_Place, int], _Open] = {}
        self._announced: dict[_Place, _Announced] = {}

    def submit(self, member: Member, job: Job) -> None:
        """Queue one request of a member.

        Raises:
            StaleRequestError: too late, or not of this round.
            ProtocolError: it contradicts the plan or the run's terms.
        """
        round_ = self._round
        if job.round != round_.number or member.device_id not in round_.participants:
            raise StaleRequestError(f"round {job.round} goes on without {member.device_id}")
        if member.device_id not in round_.exchanging:
            # The round would wait for none of it, and what it keeps open takes others' place.
            raise ProtocolError(f"{member.device_id} holds the whole model and exchanges nothing")
        if isinstance(job, Activations):
            self._check(member, job)
        elif (_place(member, job), job.micro_batch) not in self._open:
            raise ProtocolError(f"gradients of a micro-batch that is not open: {job.micro_batch}")
        self._queue.append((member, job))

    def drop(self, device: DeviceId) -> None:
        """Forget everything of a device that is gone."""
        self._queue = deque(entry for entry in self._queue if entry[0].device_id != device)
        self._open = {k: v for k, v in self._open.items() if k[0].device != device}
        self._announced = {k: v for k, v in self._announced.items() if k.device != device}
        self._trainer.drop(device)

    def served(self) -> frozenset[DeviceId]:
        """Return who waits for the server: its request is due, or only others keep it from it.

        One that itself keeps micro-batches open has something to do before it may complain.
        """
        holders = {place.device for place, _ in self._open}
        return frozenset(
            member.device_id
            for member, job in self._queue
            if self._is_due(job) or (self._is_of_open_step(job) and member.device_id not in holders)
        )

    def run_one(self) -> Done | Failed | None:
        """Carry out the first job whose turn it is; None where there is none.

        A job that cannot be carried out changes nothing and comes back as `Failed`.
        """
        due = [entry for entry in self._queue if self._is_due(entry[1])]
        if not due:
            return None
        # What closes a micro-batch comes first: it sets memory free.
        entry = next((one for one in due if isinstance(one[1], HiddenGradients)), due[0])
        self._queue.remove(entry)
        member, job = entry
        try:
            return self._carry_out(member, job)
        except HsplitError as error:
            self._forget(member, job)
            return Failed(member, job, error)

    def _check(self, member: Member, job: Activations) -> None:
        plan = member.plan
        assert plan is not None  # participants have one
        self._check_size(job, plan.micro_batch, what=_name(member, job))
        if job.purpose == "evaluate":
            return
        if job.step < self._round.step:
            raise StaleRequestError(f"step {job.step} was closed without this micro-batch")
        if job.purpose == "probe":
            self._check_probe(member, job)
        else:
            self._check_step(member, job, batch=plan.batch)
        if job.micro_batch >= job.micro_batches:
            raise ProtocolError(f"micro-batch {job.micro_batch} of {job.micro_batches}")
        self._announce(member, job)

    def _check_step(self, member: Member, job: Activations, *, batch: int) -> None:
        if job.step > self._round.step + 1 or job.step >= self._round.end_step:
            raise ProtocolError(f"step {job.step} while step {self._round.step} is open")
        if job.micro_batches > batch:
            raise ProtocolError(f"micro-batch {job.micro_batch} of {job.micro_batches}")
        waiting = [other for who, other in self._queue if who is member]
        if any(one.purpose == "probe" for one in (*waiting, *self._open_of(member))):
            raise ProtocolError(f"step {job.step} begins while probe micro-batches are open")

    def _check_probe(self, member: Member, job: Activations) -> None:
        """Refuse a probe at any other time than before the device's first step of the round."""
        training = _Place(member.device_id, job.step, "train")
        if job.micro_batches > self._limits.probe_sequences:
            raise ProtocolError(
                f"{job.micro_batches} micro-batches to probe, where {self._limits.probe_sequences} "
                "sequences were asked for"
            )
        if job.step != self._round.first_step or training in self._announced:
            raise ProtocolError(
                f"a probe at step {job.step}: it comes before the round's first training "
                f"micro-batch, and names step {self._round.first_step}"
            )

    def _check_size(self, job: Activations, micro_batch: int, *, what: str) -> None:
        """Refuse, before it is queued, what is larger than planned or contradicts itself."""
        most = self._limits.evaluate_batch if job.purpose == "evaluate" else micro_batch
        tokens = sum(job.lengths)
        if len(job.lengths) > most or max(job.lengths) > self._limits.max_length:
            raise ProtocolError(
                f"{what}: {len(job.lengths)} sequences of up to {max(job.lengths)} tokens, where "
                f"at most {most} of {self._limits.max_length} are agreed"
            )
        if job.hidden.shape[:1] != (tokens,) or job.target_tokens > tokens:
            raise NumericsError(
                f"{what}: {job.hidden.shape[:1]} activations and {job.target_tokens} targets "
                f"for {tokens} tokens"
            )
        if job.labels is not None and job.labels.dtype == "int32":
            targets = int(np.count_nonzero(unpack(job.labels) >= 0))
            if targets != job.target_tokens:
                raise NumericsError(
                    f"{what}: {job.target_tokens} targets stated, {targets} labels sent"
                )

    def _announce(self, member: Member, job: Activations) -> None:
        """Note a micro-batch: the round, which counts on that, must hear of each one once."""
        here = _place(member, job)
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
        due = {k: v for k, v in self._announced.items() if k.step >= now}
        self._announced = due | {here: step}

    def _open_of(self, member: Member) -> list[_Place]:
        return [place for place, _ in self._open if place.device == member.device_id]

    def _forget(self, member: Member, job: Job) -> None:
        step = self._announced.get(_place(member, job))
        if isinstance(job, Activations) and step is not None:
            step.indices.discard(job.micro_batch)

    def _is_due(self, job: Job) -> bool:
        if isinstance(job, HiddenGradients) or job.purpose == "evaluate":
            return True
        return self._is_of_open_step(job) and len(self._open) < self._limits.open_micro_batches

    def _is_of_open_step(self, job: Job) -> bool:
        # A probe names the round's first step, which is open until the prober has trained too.
        return job.step == self._round.step

    def _carry_out(self, member: Member, job: Job) -> Done:
        if isinstance(job, HiddenGradients):
            return self._take_gradients(member, job)
        if job.purpose == "evaluate":
            return self._evaluate(member, job)
        return self._train_or_probe(member, job)

    def _evaluate(self, member: Member, job: Activations) -> Done:
        result = self._trainer.evaluate(member.device_id, _input(member, job))
        if isinstance(result, LossResult):
            loss_sum, counts = result.loss_sum, result.counts
            return Done(member, EvaluatedLoss(call=job.call, loss_sum=loss_sum, counts=counts))
        return Done(member, Hidden(call=job.call, hidden=result.hidden))

    def _train_or_probe(self, member: Member, job: Activations) -> Done:
        device, key, sent = member.device_id, _key(job), _input(member, job)
        if job.purpose == "probe":
            tokens = job.target_tokens
            result = self._trainer.probe.run(device, key, sent, target_tokens=tokens)
        else:
            result = self._trainer.train(device, key, sent)
        opened = _Open(job.micro_batches, job.target_tokens)
        if isinstance(result, GradientResult):
            return _finished(member, job, opened, result.gradient, loss_sum=result.loss_sum)
        self._open[_place(member, job), job.micro_batch] = opened
        trains = job.purpose == "train"
        return Done(member, Hidden(call=job.call, hidden=result.hidden), trains)

    def _take_gradients(self, member: Member, job: HiddenGradients) -> Done:
        probe, trainer = self._trainer.probe, self._trainer
        take = probe.take_gradient if job.purpose == "probe" else trainer.train_gradient
        gradient = take(member.device_id, _key(job), job.gradient)
        opened = self._open.pop((_place(member, job), job.micro_batch))
        return _finished(member, job, opened, gradient, loss_sum=job.loss_sum)


def _finished(
    member: Member, job: Job, opened: _Open, gradient: TensorFrame, *, loss_sum: float
) -> Done:
    """Return the last answer to a micro-batch; the round hears of it if it was to train."""
    answer = ActivationGradients(call=job.call, gradient=gradient, loss_sum=loss_sum)
    if job.purpose == "probe":
        return Done(member, answer)
    event = MicroBatchDone(
        member.device_id, job.step, job.micro_batch, opened.micro_batches, opened.target_tokens
    )
    return Done(member, answer, True, event, loss_sum)


def _place(member: Member, job: Job) -> _Place:
    return _Place(member.device_id, job.step, job.purpose)


def _key(job: Job) -> MicroBatchKey:
    return MicroBatchKey(job.step, job.micro_batch)


def _name(member: Member, job: Activations) -> str:
    """Return what an error calls a micro-batch."""
    if job.purpose == "evaluate":
        return f"evaluation of {member.device_id}"
    purpose = "probe of " if job.purpose == "probe" else ""
    return name_of(member.device_id, _key(job), purpose=purpose)


def _input(member: Member, job: Activations) -> MicroBatchInput:
    assert member.plan is not None  # participants have one
    return MicroBatchInput(
        split_layer=member.plan.split_layer,
        lengths=job.lengths,
        hidden=job.hidden,
        labels=job.labels,
    )
