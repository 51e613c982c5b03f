"""One round in the making: takes what participants send, does what `rounds.Round` says."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence

from coordinator import classifier, importance
from coordinator.aggregation import Aggregated, Contribution, block_of
from coordinator.exchange import Exchange, ExchangeLimits, Failed, Job
from coordinator.fleet import Observations
from coordinator.global_model import GlobalModel
from coordinator.handback import HandBack, check_adapters
from coordinator.importance import Measured
from coordinator.membership import Membership, StaleRequestError
from coordinator.registry import Member
from coordinator.reporting import Reporter
from coordinator.rounds import (
    CloseEvaluation,
    CloseRound,
    CloseStep,
    Delivered,
    Evaluated,
    Event,
    Instruction,
    LeaveOut,
    Lost,
    Round,
    Tick,
)
from coordinator.wire_adapters import from_wire
from shared.adapters import AdapterState
from shared.class_counts import check_counts
from shared.classifier_weights import ClassifierTensors
from shared.clock import Clock
from shared.errors import NumericsError
from shared.protocol import weights as classifier_weights
from shared.protocol.messages import Accepted, DeviceId, EvaluationResult, RoundResult
from shared.schedule import learning_rate
from shared.terms import OptimizerTerms

logger = logging.getLogger(__name__)


class RoundDriver:
    """Carries one round to its end. ``outcome`` is None until then.

    ``handed``: what everybody starts from; ``alone``: those who hold the whole model.
    """

    def __init__(
        self,
        round_: Round,
        *,
        handed: HandBack,
        alone: frozenset[DeviceId],
        model: GlobalModel,
        members: Membership,
        reporter: Reporter,
        optimizer: OptimizerTerms,
        total_steps: int,
        limits: ExchangeLimits,
        candidates: Collection[str],
        clock: Clock,
    ) -> None:
        """Open the round; ``candidates``: the modules whose importance may be measured."""
        self.round = round_
        self.outcome: CloseRound | None = None
        self._handed = handed
        self._holders = handed.holders
        self.alone = alone
        self._model = model
        self._members = members
        self._listener = members.listener
        self._reporter = reporter
        self._optimizer = optimizer
        self._total_steps = total_steps
        self._exchange = (
            None if model.trainer is None else Exchange(model.trainer, round_, limits=limits)
        )
        self._candidates = candidates
        self._clock = clock
        self._server_busy_s = 0.0
        self._importance: dict[DeviceId, Mapping[str, Measured]] = {}
        self._adapters: dict[DeviceId, AdapterState] = {}
        self._classifiers: dict[DeviceId, ClassifierTensors] = {}
        self._results: dict[DeviceId, RoundResult] = {}

    # --- what participants send ---------------------------------------------------------------

    def submit(self, member: Member, job: Job) -> None:
        """Queue one micro-batch.

        Raises:
            StaleRequestError: too late, or not a participant.
            ProtocolError: it contradicts the plan.
        """
        self._check(member, job.round)
        if self._exchange is None:
            raise StaleRequestError("this round exchanges nothing")
        self._exchange.submit(member, job)

    def evaluated(self, member: Member, result: EvaluationResult) -> None:
        """Take a participant's held-out loss, and how important its weights are to it.

        Raises:
            ProtocolError: it speaks of a module that is not in its front.
            NumericsError: an importance is no number that can be, or a classifier's choices
                cannot be.
        """
        self._check(member, result.round)
        classes = self._model.class_count
        check_counts(result.counts, classes=classes, examples=result.target_tokens)
        blocks = self._holders[member.device_id].blocks
        here = {name for name in self._candidates if block_of(name) in blocks}
        # By device: one that evaluates twice is not heard twice.
        self._importance[member.device_id] = importance.from_device(
            result.importance, result.probe_tokens, candidates=here
        )
        self._reporter.evaluated(member.device_id, result)
        self._members.answer(member, Accepted(call=result.call))
        self._advance(Evaluated(member.device_id))

    def delivered(self, member: Member, result: RoundResult) -> None:
        """Take a participant's adapters, and its classifier where it has one.

        Raises:
            NumericsError: an adapter, or a classifier's weight, is missing, misshapen or not
                finite.
        """
        self._check(member, result.round)
        adapters = from_wire(result.adapters)
        holder = self._holders[member.device_id]
        check_adapters(adapters, holder=holder, update=self._model.update)
        weights = classifier_weights.from_wire(result.classifier)
        classifier.check(weights, like=self._model.classifier_of_devices)
        self._advance(Delivered(member.device_id, result.target_tokens))
        self._adapters[member.device_id] = adapters
        self._classifiers[member.device_id] = weights
        self._results[member.device_id] = result
        self._listener.delivered(member.device_id)

    def lose(self, member: Member) -> None:
        """Go on without a participant (or somebody who is none)."""
        if self._exchange is not None and member.device_id not in self.round.delivered:
            self._exchange.drop(member.device_id)
        self._listener.dropped(member.device_id)
        self._advance(Lost(member.device_id))

    def tick(self, seconds: float, *, active: frozenset[DeviceId]) -> Sequence[LeaveOut]:
        """Let time pass; return whom the round no longer waits for.

        ``active``: members that asked for something since the last time, or whose link is busy.
        """
        served = self._exchange.served() if self._exchange is not None else frozenset()
        return self._advance(Tick(seconds, served=served, active=active))

    def work(self) -> Failed | bool:
        """Carry out one waiting micro-batch; False where there is none."""
        began_s = self._clock.monotonic_s()
        done = None if self._exchange is None else self._exchange.run_one()
        if done is None:
            return False
        if isinstance(done, Failed):
            return done
        if done.trains:
            self._server_busy_s += self._clock.monotonic_s() - began_s
        self._members.answer(done.member, done.reply)
        if done.event is not None:
            self._reporter.micro_batch(done.event.device, done.loss_sum, done.event.target_tokens)
            self._listener.micro_batch(done.event)
            self._advance(done.event)
        return True

    def _check(self, member: Member, number: int) -> None:
        if number != self.round.number or member.device_id not in self.round.participants:
            raise StaleRequestError(
                f"round {self.round.number} is open, without {member.device_id} or not {number}"
            )

    # --- what the round says ------------------------------------------------------------------

    def _advance(self, event: Event) -> Sequence[LeaveOut]:
        instructions = self.round.handle(event)
        for instruction in instructions:
            self._obey(instruction)
        return [one for one in instructions if isinstance(one, LeaveOut)]

    def _obey(self, instruction: Instruction) -> None:
        if isinstance(instruction, CloseEvaluation):
            self._reporter.evaluation_closed(self.round.number, self.round.first_step)
        elif isinstance(instruction, CloseStep):
            self._close_step(instruction)
        elif isinstance(instruction, LeaveOut):
            if self._exchange is not None:
                self._exchange.drop(instruction.device)
            reason = f"waited {instruction.waited_s:.0f} s for it"
            self._listener.left_out(instruction.device, reason)
        else:
            self.outcome = instruction
            if self.round.end_step == self.round.first_step:
                self._listener.round_closed(self.round.number)
            elif not instruction.delivered:
                self._listener.round_void("every device was lost")

    def _close_step(self, close: CloseStep) -> None:
        assert self._model.trainer is not None  # somebody exchanged
        began_s = self._clock.monotonic_s()
        try:
            norm = self._model.trainer.close_step(
                close.step, devices=close.devices, target_tokens=close.target_tokens
            )
        except NumericsError as error:
            logger.warning("step %d: the server's adapter stays as it is: %s", close.step, error)
            norm = float("nan")
        self._server_busy_s += self._clock.monotonic_s() - began_s
        self._listener.step_closed(close, applied=not math.isnan(norm))
        rate = learning_rate(self._optimizer, close.step, total_steps=self._total_steps)
        self._reporter.step_closed(
            self.round.number,
            close.step,
            devices=close.devices,
            gradient_norm=norm,
            learning_rate=rate,
        )

    def sizes(self) -> Mapping[DeviceId, Mapping[str, float]]:
        """Return how large the update of each device is that delivered, by what it is of."""
        rates = [
            learning_rate(self._optimizer, step, total_steps=self._total_steps)
            for step in range(self.round.first_step, self.round.end_step)
        ]
        return {
            device: self._model.size_of(
                self._adapters[device],
                self._classifiers[device],
                holder=self._holders[device],
                learning_rates=sum(rates),
            )
            for device in self.accepted
        }

    @property
    def accepted(self) -> Sequence[DeviceId]:
        """Whose adapters count, once the round is over."""
        assert self.outcome is not None  # the round is over
        return self.outcome.delivered

    def refuse(self, device: DeviceId) -> None:
        """Take back what a device delivered, as if it had been lost before that.

        Its gradients are in the server's part; so are those of any device lost as late.
        """
        self.outcome = CloseRound(tuple(one for one in self.accepted if one != device))
        self._listener.update_refused(device)
        for kept in (self._adapters, self._classifiers, self._results, self._importance):
            kept.pop(device, None)

    def aggregate(self) -> Aggregated:
        """Bring what was delivered into the global update, and report it."""
        contributions = self._contributions()
        aggregated = self._model.finish_round(contributions)
        tokens = {DeviceId(one.device): one.target_tokens for one in contributions}
        self._listener.round_closing(self.accepted, tokens, error=aggregated.error)
        self._reporter.round_closed(
            self.round.number,
            self.round.end_step,
            aggregated=aggregated,
            tokens=tokens,
            results=self._results,
            telemetry={
                member.device_id: member.telemetry
                for member in self._members.registry
                if member.telemetry is not None
            },
            server_busy_s=self._server_busy_s,
            alone=self.alone,
        )
        return aggregated

    def observations(self) -> Observations:
        """Return what the round taught. The server's importance is taken: ask once."""
        round_ = self.round
        reports = [self._importance[device] for device in sorted(self._importance)]
        if self._model.trainer is not None:
            reports.append(self._model.trainer.probe.take())
        return Observations(
            steps=round_.end_step - round_.first_step,
            progress=round_.end_step / self._total_steps,
            compute_s={device: one.compute_s for device, one in self._results.items()},
            server_busy_s=self._server_busy_s,
            importance=reports,
        )

    def _contributions(self) -> Sequence[Contribution]:
        return [
            Contribution(
                device=device,
                split_layer=self._holders[device].blocks.stop,
                target_tokens=tokens,
                adapters=self._adapters[device] if device in self.accepted else None,
                classifier=self._classifiers.get(device, {}),
            )
            for device, tokens in sorted(self.round.target_tokens.items())
            # One that trained alone and was refused is in nothing.
            if device in self.accepted or device not in self.alone
        ]
