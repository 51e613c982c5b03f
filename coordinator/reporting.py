"""What the operator sees of a run: metrics, a progress bar, one line a round, the summary."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from coordinator.aggregation import Aggregated
from coordinator.journal import Journal
from coordinator.metrics import DeviceSummary, MetricsWriter, Summary
from coordinator.planning.device_plan import DevicePlan, ranks_in_short
from coordinator.planning.planner import FleetPlan
from coordinator.scores import Scores, scores_of
from shared.class_counts import total
from shared.clock import Clock
from shared.errors import StorageError
from shared.protocol.messages import DeviceId, EvaluationResult, RoundResult
from shared.protocol.profile import Telemetry
from shared.transport.link import MessageLink

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Mean:
    nats: float = 0.0
    target_tokens: int = 0

    def add(self, nats: float, target_tokens: int) -> None:
        self.nats += nats
        self.target_tokens += target_tokens

    @property
    def value(self) -> float:
        return self.nats / self.target_tokens if self.target_tokens else math.nan


@dataclass(slots=True)
class Tallies:
    """What a run counts from its first step on; goes into every checkpoint."""

    steps: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    f1_before: float | None = None
    f1_after: float | None = None
    target_tokens: dict[str, int] = field(default_factory=dict)
    plans: dict[str, DeviceSummary] = field(default_factory=dict)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Tallies:
        """Return the tallies that `Reporter.state` put into a checkpoint.

        Raises:
            StorageError: they are damaged.
        """
        # A checkpoint may be older than a field that has a default.
        known = {one.name: state[one.name] for one in fields(cls) if one.name in state}
        try:
            plans = {device: DeviceSummary(**plan) for device, plan in state["plans"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"the checkpoint's tallies are damaged: {error!r}") from error
        return cls(**{**known, "plans": plans})


class Reporter:
    """Takes what happens and writes it down. Belongs to the owner's thread."""

    def __init__(
        self,
        writer: MetricsWriter,
        link: MessageLink,
        clock: Clock,
        *,
        total_steps: int,
        tallies: Tallies,
        journal: Journal | None = None,
    ) -> None:
        """Go on from ``tallies``; ``journal`` None: plans and importance are not written."""
        self._writer = writer
        self._link = link
        self._clock = clock
        self._total_steps = total_steps
        self.tallies = tallies
        self._journal = journal
        self._written: Mapping[DeviceId, DevicePlan] = {}
        self._began_s = clock.monotonic_s() - tallies.seconds
        self._round_began_s = clock.monotonic_s()
        self._bytes_before = (tallies.bytes_up, tallies.bytes_down)
        self._step_losses: dict[DeviceId, _Mean] = {}
        self._round_loss = _Mean()
        self._evaluations: dict[DeviceId, EvaluationResult] = {}
        self._bar: tqdm[None] | None = None
        self._of = 0
        self._round_line = ""
        self._terminal = contextlib.ExitStack()

    # --- events -------------------------------------------------------------------------------

    def round_started(self, number: int, *, of: int, plans: Mapping[DeviceId, DevicePlan]) -> None:
        """Note who takes part."""
        self._round_began_s = self._clock.monotonic_s()
        self._round_loss = _Mean()
        self._step_losses.clear()
        self._evaluations.clear()
        for device, plan in plans.items():
            summary = DeviceSummary(
                split_layer=plan.split_layer, ranks=dict(plan.ranks), target_tokens=0
            )
            if plan != self._written.get(device):
                logger.info(
                    "%s: split layer %d, ranks %s, %d sequences a step",
                    device,
                    plan.split_layer,
                    ranks_in_short(plan.ranks),
                    plan.batch,
                )
            self.tallies.plans[device] = summary
        if number <= of:
            logger.debug("round %d of %d starts with %s", number, of, ", ".join(sorted(plans)))
        self._of = of

    def planned(
        self,
        round_: int,
        step: int,
        *,
        plans: Mapping[DeviceId, DevicePlan],
        server_ranks: Mapping[str, int],
        fleet: FleetPlan | None,
    ) -> None:
        """Write the parts of a round's devices where they are other than before.

        ``server_ranks`` by module, of the blocks that the server holds. ``fleet``: the latest plan
        that was made for all together, if one was.
        """
        if plans == self._written:
            return
        self._written = dict(plans)
        if fleet is not None:
            logger.info("a step should take %.3g s", fleet.predicted_step_s)
        if self._journal is not None:
            self._journal.plan(
                round_,
                step,
                predicted_step_s=None if fleet is None else fleet.predicted_step_s,
                devices={device: _entry(device, plan, fleet) for device, plan in plans.items()},
                refused={} if fleet is None else {str(d): why for d, why in fleet.refused.items()},
                server_ranks=server_ranks,
            )

    def weighed(self, round_: int, step: int, scores: Mapping[str, float]) -> None:
        """Write how important each module is, as measured in round ``round_``."""
        if self._journal is not None:
            self._journal.importance(round_, step, scores)

    def round_void(self, step: int) -> None:
        """Forget what a round did that is repeated from ``step`` steps on."""
        self._writer.rewind(step)
        self.tallies.steps = step

    def micro_batch(self, device: DeviceId, loss_sum: float, target_tokens: int) -> None:
        """Add one training micro-batch of the open step."""
        self._step_losses.setdefault(device, _Mean()).add(loss_sum, target_tokens)

    def step_closed(
        self,
        round_: int,
        step: int,
        *,
        devices: Sequence[DeviceId],
        gradient_norm: float,
        learning_rate: float,
    ) -> None:
        """Write the figures of a closed step, to which ``devices`` contributed."""
        self.tallies.steps = step + 1
        step_loss = _Mean()
        for mean in (self._step_losses[device] for device in devices):
            step_loss.add(mean.nats, mean.target_tokens)
        self._step_losses.clear()
        self._round_loss.add(step_loss.nats, step_loss.target_tokens)
        values = {
            "train/loss": step_loss.value,
            "train/target_tokens": float(step_loss.target_tokens),
            "train/server_gradient_norm": gradient_norm,
            "train/learning_rate": learning_rate,
            **self._traffic(),
        }
        self._writer.write(values, round_=round_, step=step + 1)
        self._advance(step + 1, step_loss.value)

    def evaluated(self, device: DeviceId, result: EvaluationResult) -> None:
        """Take one device's held-out loss."""
        self._evaluations[device] = result

    def evaluation_closed(self, round_: int, step: int) -> None:
        """Write how good the state is that round ``round_`` starts from, on all held-out data."""
        if not any(result.target_tokens for result in self._evaluations.values()):
            return
        mean = _Mean()
        for result in self._evaluations.values():
            mean.add(result.loss_sum, result.target_tokens)
        counts = total(result.counts for result in self._evaluations.values())
        scores = scores_of(counts)
        values = {"eval/loss": mean.value}
        if scores is None:
            words = self._note_perplexity(_perplexity(mean.value), values, first=step == 0)
        else:
            words = self._note_scores(scores, values, first=step == 0)
        self._writer.write(values, round_=round_ - 1, step=step)
        logger.info(
            "after %d of %d rounds, %d steps: %sheld-out %s (devices: %d)",
            round_ - 1,
            self._of,
            step,
            self._round_line,
            words,
            len(self._evaluations),
        )
        self._round_line = ""

    def _note_perplexity(self, perplexity: float, values: dict[str, float], *, first: bool) -> str:
        for device, result in self._evaluations.items():
            if result.target_tokens:
                own = result.loss_sum / result.target_tokens
                values[f"device/{device}/perplexity"] = _perplexity(own)
        values["eval/perplexity"] = perplexity
        finite = perplexity if math.isfinite(perplexity) else None
        if first:
            self.tallies.perplexity_before = finite
        self.tallies.perplexity_after = finite
        return f"perplexity {perplexity:.2f}"

    def _note_scores(self, scores: Scores, values: dict[str, float], *, first: bool) -> str:
        for device, result in self._evaluations.items():
            own = scores_of(result.counts)
            if own is not None:
                values[f"device/{device}/accuracy"] = own.accuracy
        values |= scores.by_metric()
        if first:
            self.tallies.accuracy_before, self.tallies.f1_before = scores.accuracy, scores.f1
        self.tallies.accuracy_after, self.tallies.f1_after = scores.accuracy, scores.f1
        return f"accuracy {scores.accuracy:.1%}, F1 {scores.f1:.1%}"

    def not_evaluated(self) -> None:
        """Note that nobody evaluated the outcome of the run."""
        self.tallies.perplexity_after = None
        self.tallies.accuracy_after = self.tallies.f1_after = None

    def round_closed(
        self,
        round_: int,
        step: int,
        *,
        aggregated: Aggregated,
        tokens: Mapping[DeviceId, int],
        results: Mapping[DeviceId, RoundResult],
        telemetry: Mapping[DeviceId, Telemetry],
        server_busy_s: float,
        alone: Collection[DeviceId],
    ) -> None:
        """Write the figures of an aggregated round, and how its devices were at its end.

        The losses of devices that train ``alone`` are known only now, from their ``results``.
        """
        for device, result in results.items():
            if device in alone:
                self._round_loss.add(result.loss_sum, result.target_tokens)
        self.tallies.steps = step
        self.tallies.target_tokens = dict(Counter(self.tallies.target_tokens) + Counter(tokens))
        seconds = self._clock.monotonic_s() - self._round_began_s
        values = {
            "round/seconds": seconds,
            "round/train_loss": self._round_loss.value,
            "aggregation/norm": aggregated.norm,
            "aggregation/largest_rank": float(aggregated.largest_rank),
            "aggregation/relative_error": aggregated.largest_error,
            "aggregation/error": aggregated.error,
            "round/server_busy_s": server_busy_s,
            **self._traffic(),
            **{f"device/{device}/busy_s": result.busy_s for device, result in results.items()},
            **{f"device/{device}/compute_s": one.compute_s for device, one in results.items()},
            **_readings(telemetry),
            **{f"device/{device}/target_tokens": float(n) for device, n in tokens.items()},
        }
        self._writer.write(values, round_=round_, step=step)
        self._advance(step, self._round_loss.value)
        # It waits for the perplexity that belongs to it: one line a round.
        loss = self._round_loss.value
        self._round_line = f"{seconds:.1f} s, training loss {loss:.3f}, "
        logger.debug("round %d aggregated from %s", round_, ", ".join(sorted(results)))

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint must hold for `Tallies.restored`."""
        self.measure()
        return asdict(self.tallies)

    def measure(self) -> None:
        """Bring seconds and bytes up to date."""
        up, down = self._bytes_before
        self.tallies.seconds = self._clock.monotonic_s() - self._began_s
        self.tallies.bytes_up = up + self._link.bytes_received.total()
        self.tallies.bytes_down = down + self._link.bytes_sent.total()

    def _traffic(self) -> dict[str, float]:
        self.measure()
        up, down = self.tallies.bytes_up, self.tallies.bytes_down
        return {"traffic/bytes_up": float(up), "traffic/bytes_down": float(down)}

    def summary(self) -> Summary:
        """Return the run's summary as of now."""
        self.measure()
        tallies = self.tallies
        devices = {
            DeviceId(device): DeviceSummary(
                split_layer=plan.split_layer,
                ranks=plan.ranks,
                target_tokens=tallies.target_tokens.get(device, 0),
            )
            for device, plan in sorted(tallies.plans.items())
        }
        return Summary(
            perplexity_before=tallies.perplexity_before,
            perplexity_after=tallies.perplexity_after,
            steps=tallies.steps,
            seconds=tallies.seconds,
            bytes_up=tallies.bytes_up,
            bytes_down=tallies.bytes_down,
            devices=devices,
            accuracy_before=tallies.accuracy_before,
            accuracy_after=tallies.accuracy_after,
            f1_before=tallies.f1_before,
            f1_after=tallies.f1_after,
        )

    def close(self) -> None:
        """Close the bar and the files."""
        if self._bar is not None:
            self._bar.close()
        self._terminal.close()
        self._writer.close()
        if self._journal is not None:
            self._journal.close()

    def _advance(self, step: int, loss: float) -> None:
        """Move the progress bar, which exists only where a person watches a terminal."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._terminal.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(total=self._total_steps, unit="step", dynamic_ncols=True)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(loss=f"{loss:.3f}")


def _entry(device: DeviceId, plan: DevicePlan, fleet: FleetPlan | None) -> dict[str, Any]:
    """Return one device's part as the journal holds it."""
    reason = None if fleet is None else fleet.reasons.get(device)
    own = None if fleet is None else fleet.prediction.devices.get(device)
    return {
        "split_layer": plan.split_layer,
        "batch": plan.batch,
        "micro_batch": plan.micro_batch,
        "in_flight": plan.in_flight,
        "ranks": dict(plan.ranks),
        "reason": "" if reason is None else str(reason),
        "predicted_step_s": None if own is None else own.own_s,
    }


def _readings(telemetry: Mapping[DeviceId, Telemetry]) -> dict[str, float]:
    """Return what sensors said in numbers, by metric name: ``device/nano/temperature_c``."""
    readings = {device: asdict(one) for device, one in telemetry.items()}
    return {
        f"device/{device}/{name}": float(value)
        for device, one in readings.items()
        for name, value in one.items()
        if isinstance(value, int | float)
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
