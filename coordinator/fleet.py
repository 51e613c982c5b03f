"""The devices of a run as one fleet: what is known of them, and the plan that follows from it.

What it decides is decided by pure functions (`planner`, `replanning`, `importance`); here is
what has to be remembered from round to round. No I/O. Belongs to the owner's thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from coordinator.importance import Importance, Measured, theta
from coordinator.planning.assigned_ranks import RankBook
from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.device_plan import DevicePlan
from coordinator.planning.planner import FleetPlan, plan_fleet
from coordinator.planning.prediction import Prediction, predict
from coordinator.planning.replanning import (
    LEAST_ROUNDS_APART,
    Decision,
    History,
    Proposal,
    Standing,
    assumed,
    decide,
    switch_seconds,
)
from coordinator.registry import Member
from coordinator.settings import CoordinatorSettings
from shared.architecture import ModelArchitecture
from shared.errors import PlanError, StorageError
from shared.protocol.messages import DeviceId
from shared.protocol.profile import Measurements
from shared.protocol.tensors import ITEM_BYTES

logger = logging.getLogger(__name__)

STATE = "fleet"
"""Its key in a checkpoint."""
LOAD_S = 2.0
"""About what a device needs to build its part anew, beside fetching it."""
MUCH_LESS = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What an aggregated round taught of its devices, the server and the weights.

    ``compute_s``: what each device computed in the round's ``steps``; ``server_busy_s``: what the
    server did for all of them. ``progress``: how much of the run is done, 0 to 1.
    ``importance``: the reports of devices and server; empty where nothing was probed.
    """

    steps: int
    progress: float
    compute_s: Mapping[DeviceId, float]
    server_busy_s: float
    importance: Sequence[Mapping[str, Measured]] = ()


@dataclass(frozen=True, slots=True)
class _Anchor:
    """Where a device was in the order of its sequences at a step, and what it takes a step."""

    step: int
    position: int
    batch: int

    def at(self, step: int) -> int:
        """Return where it is at another step."""
        return self.position + (step - self.step) * self.batch


class Fleet:
    """Knows the devices of one run, and decides who does what."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        architecture: ModelArchitecture,
        *,
        measure_server: Callable[[int, int], Measurements] | None = None,
    ) -> None:
        """Start without a plan.

        ``measure_server`` is called once, with the sequences of a micro-batch and their length,
        when the first device is to be planned that measured itself; None: the server's work
        counts as free.
        """
        self._settings = settings
        self._architecture = architecture
        self._measure_server = measure_server
        self._server: Measurements | None = None
        self._server_slowdown = self._seen_server_slowdown = 1.0
        self._slowdowns: dict[DeviceId, float] = {}
        self._seen_slowdowns: dict[DeviceId, float] = {}
        self._planned_with: dict[DeviceId, float] = {}
        self._most: dict[DeviceId, tuple[int, int]] = {}
        self._changed_round: int | None = None
        self._expected: Prediction | None = None
        self._anchors: dict[DeviceId, _Anchor] = {}
        self.importance = Importance({})
        self._ranked_by = Importance({})
        self.latest: FleetPlan | None = None
        """The plan in force, as far as it was planned together."""

    # --- who is planned, and what for ----------------------------------------------------------

    def is_planned(self, device: DeviceId) -> bool:
        """Tell whether a device's part is planned; else its settings state it."""
        return self._settings.device_terms(device).split_layer is None

    def measure_at(self, device: DeviceId) -> int | None:
        """Return the micro-batch at which a device should measure itself; None: not at all."""
        return self._settings.device_terms(device).micro_batch if self.is_planned(device) else None

    def probe_sequences(self, round_: int) -> int:
        """Return on how many sequences each device should measure importance in a round."""
        plan = self._settings.plan
        due = (round_ - 1) % plan.probe_every == 0
        return plan.probe_sequences if due and self._ranks_move else 0

    @property
    def _ranks_move(self) -> bool:
        return self.latest is not None and self._settings.plan.ranks == "importance"

    def server_ranks(self, blocks: range) -> tuple[Mapping[str, int], Mapping[str, float]]:
        """Return the ranks and scalings of the server's copy of ``blocks``."""
        return self._rank_book.of(self._settings.lora, blocks)

    @property
    def _rank_book(self) -> RankBook:
        return RankBook(self._conditions, self._ranked_by.scores)

    # --- planning -----------------------------------------------------------------------------

    def plan(self, ready: Collection[Member], *, others: Collection[Member]) -> FleetPlan:
        """Return parts for those who are ``ready``, beside ``others``, who keep theirs.

        Raises:
            PlanError: nobody can take part.
        """
        self._know_server(ready)
        devices = [self._device(member) for member in ready]
        devices += [self._device(member, pinned=member.plan) for member in others]
        found = plan_fleet(devices, self._conditions, importance=self._ranked_by.scores)
        if any(self.is_planned(member.device_id) for member in ready):
            self.latest = found
        self._expect(found.plans, devices)
        return found

    def _know_server(self, ready: Collection[Member]) -> None:
        measured = [one for one in ready if one.measurements is not None]
        if self._measure_server is None or not measured:
            return
        micro_batch = max(self._settings.device_terms(m.device_id).micro_batch for m in measured)
        longest = self._settings.training.max_length
        length = max(longest if m.data is None else m.data.padded_length for m in measured)
        logger.info("measuring the server's part")
        self._server = self._measure_server(micro_batch, math.ceil(length))
        self._measure_server = None

    def replan(
        self,
        waiting: Collection[Member],
        *,
        others: Collection[Member],
        round_: int,
        steps_left: int,
    ) -> Mapping[DeviceId, DevicePlan]:
        """Return other parts for those of ``waiting`` who are better off with them.

        ``waiting`` have handed in round ``round_``; ``others`` keep their parts. Nothing is
        decided about parts that the settings state, or in a run that may not adapt or is over.
        """
        if not steps_left or not self._settings.plan.adapt:
            return {}
        self._assume()
        devices = [self._device(member) for member in waiting]
        devices += [self._device(member, pinned=member.plan) for member in others]
        try:
            best = plan_fleet(devices, self._conditions, importance=self.importance.scores)
        except PlanError as error:
            logger.warning("parts stay as they are: %s", error)
            return {}
        members = [*waiting, *others]
        now = {one.device_id: one.plan for one in members if one.plan is not None}
        current = predict(now, devices, self._conditions)
        proposal = Proposal(plans=best.plans, prediction=best.prediction, current=current)
        standing = {
            member.device_id: self._standing(member, proposal)
            for member in waiting
            if self.is_planned(member.device_id) and member.device_id in best.plans
        }
        history = self._history(round_, steps_left)
        decision = decide(standing, proposal, history=history)
        if decision.why is not None:
            self._adopt(decision, best, now={**now}, devices=devices, round_=round_)
        if history.may_rank:  # the server's copy follows, though no device may have a reason to
            self._ranked_by, self._changed_round = self.importance, round_
        return decision.plans

    def _history(self, round_: int, steps_left: int) -> History:
        # The first plan rests on no training yet: it may be bettered as soon as there was some.
        last = self._changed_round
        return History(
            rounds_since_change=LEAST_ROUNDS_APART if last is None else round_ - last,
            importance_change=self.importance.change(self._ranked_by),
            steps_left=steps_left,
        )

    def _standing(self, member: Member, proposal: Proposal) -> Standing:
        assert member.plan is not None  # it took part in a round
        device = member.device_id
        link = None if member.measurements is None else member.measurements.link
        known = proposal.current.devices.get(device)
        block_bytes = (
            ITEM_BYTES[self._settings.training.dtype] * self._architecture.block_parameters
        )
        return Standing(
            plan=member.plan,
            assumed_slowdown=self._planned_with.get(device, 1.0),
            slowdown=self._slowdowns.get(device, 1.0),
            memory_limit_bytes=self._device(member).memory_limit_bytes,
            needed_bytes=0.0 if known is None else known.memory_bytes,
            switch_s=switch_seconds(
                member.plan,
                proposal.plans[device],
                block_bytes=block_bytes,
                downlink_bytes_per_s=None if link is None else link.downlink_bytes_per_s,
                load_s=LOAD_S,
            ),
        )

    def _adopt(
        self,
        decision: Decision,
        best: FleetPlan,
        *,
        now: dict[DeviceId, DevicePlan],
        devices: Sequence[FleetDevice],
        round_: int,
    ) -> None:
        self._changed_round = round_
        self._planned_with = dict(self._slowdowns)
        plans = now | dict(decision.plans)
        self.latest = replace(
            best, plans=plans, prediction=predict(plans, devices, self._conditions)
        )
        self._expect(plans, devices)
        logger.info(
            "after round %d parts change (%s) for %s",
            round_,
            decision.why,
            ", ".join(sorted(decision.plans)),
        )

    def step_seconds(self) -> Mapping[DeviceId, float]:
        """Return how long a step takes each device that measured itself, as slow as it is now."""
        known = {} if self._expected is None else self._expected.devices
        slower = {device: max(1.0, self._slowdowns.get(device, 1.0)) - 1.0 for device in known}
        return {d: one.own_s + slower[d] * one.compute_s for d, one in known.items()}

    def lighten(self, member: Member) -> None:
        """Give a device half the blocks and half the batch at most, for the rest of the run."""
        if member.plan is not None and self.is_planned(member.device_id):
            blocks, batch = member.plan.split_layer // 2, member.plan.batch // 2
            self._most[member.device_id] = (max(1, blocks), max(1, batch))

    def _assume(self) -> None:
        """Take the slowdowns that rounds showed, where they differ by more than noise."""
        for device, seen in self._seen_slowdowns.items():
            self._slowdowns[device] = assumed(self._slowdowns.get(device, 1.0), seen)
        self._server_slowdown = assumed(self._server_slowdown, self._seen_server_slowdown)

    def _device(self, member: Member, *, pinned: DevicePlan | None = None) -> FleetDevice:
        limits = [member.profile.memory_limit_bytes, _memory_now(member)]
        terms = self._settings.device_terms(member.device_id)
        blocks = member.most_blocks
        if member.device_id in self._most:
            most, batch = self._most[member.device_id]
            blocks = min(most, blocks or most)
            size = min(batch, terms.micro_batch)
            terms = replace(terms, batch=batch, micro_batch=size, batch_is_stated=True)
        return FleetDevice(
            device_id=member.device_id,
            terms=terms,
            measurements=member.measurements,
            data=member.data,
            declared_limit_bytes=min((n for n in limits if n is not None), default=None),
            most_blocks=blocks,
            slowdown=self._slowdowns.get(member.device_id, 1.0),
            pinned=pinned,
        )

    @property
    def _conditions(self) -> Conditions:
        return Conditions.of(
            self._settings,
            self._architecture,
            server=self._server,
            server_slowdown=self._server_slowdown,
        )

    def _expect(self, plans: Mapping[DeviceId, DevicePlan], devices: Sequence[FleetDevice]) -> None:
        """Remember what the plans would take if everybody were as fast as when it measured."""
        at_first = [replace(device, slowdown=1.0) for device in devices]
        conditions = replace(self._conditions, server_slowdown=1.0)
        self._expected = predict(plans, at_first, conditions)

    # --- learning from rounds -----------------------------------------------------------------

    def observe(self, seen: Observations) -> bool:
        """Take what a round taught: who is slower than measured, and which weights matter.

        Returns whether importance was measured in it.
        """
        expected = self._expected
        if expected is not None and seen.steps:
            for device, seconds in seen.compute_s.items():
                if device in expected.devices and seconds > 0:
                    a_step = expected.devices[device].compute_s
                    self._seen_slowdowns[device] = seconds / seen.steps / a_step
            if self._server is not None and seen.server_busy_s > 0 and expected.server_s > 0:
                self._seen_server_slowdown = seen.server_busy_s / seen.steps / expected.server_s
        measured = theta(seen.importance)
        if measured:
            self.importance = self.importance.updated(measured, progress=seen.progress)
        return bool(measured)

    # --- where a device is in its data ----------------------------------------------------------

    def position(self, member: Member, step: int) -> int:
        """Return where a member goes on in the order of its sequences, from ``step`` on.

        A batch that changes neither repeats sequences nor leaves any out.
        """
        assert member.plan is not None  # participants have one
        batch = member.plan.batch
        before = self._anchors.get(member.device_id)
        position = step * batch if before is None else before.at(step)
        self._anchors[member.device_id] = _Anchor(step, position, batch)
        return position

    # --- checkpoints --------------------------------------------------------------------------

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint must hold for `resume`."""
        anchors = {device: asdict(anchor) for device, anchor in self._anchors.items()}
        return {
            STATE: {
                "positions": anchors,
                "importance": self.importance.state(),
                "ranked_by": self._ranked_by.state(),
                "most": {device: list(most) for device, most in self._most.items()},
            }
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            StorageError: it is damaged.
        """
        saved = state.get(STATE)
        if saved is None:
            return  # of a version that did not plan
        try:
            self._anchors = {
                DeviceId(device): _Anchor(**anchor) for device, anchor in saved["positions"].items()
            }
            self.importance = Importance.restored(saved["importance"])
            self._ranked_by = Importance.restored(saved["ranked_by"])
            limits = saved.get("most", {}).items()  # an older version had none
            self._most = {DeviceId(device): (int(k), int(batch)) for device, (k, batch) in limits}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(f"the checkpoint's plans are damaged: {error!r}") from error


def _memory_now(member: Member) -> int | None:
    """Return what a device can use by its latest telemetry, where that is much less than it was.

    Free memory comes and goes: a tenth less is no reason to move blocks.
    """
    now, measured = member.telemetry, member.measurements
    if now is None or now.free_memory_bytes is None or now.used_memory_bytes is None:
        return None
    if measured is None or measured.memory_bytes is None:
        return None
    usable = now.free_memory_bytes + now.used_memory_bytes
    return usable if 0 < usable < MUCH_LESS * measured.memory_bytes else None
