"""Who does what: devices that are ready get a part, say that they are prepared, and may change.

A part changes in two phases (DESIGN): the `Assignment` proposes, the device fetches and loads
what it needs and answers `Prepared`, and the next `RoundStart` commits. So nobody trains on a
plan that somebody else does not know of yet.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from coordinator import answers
from coordinator.deadlines import MOST_TIMEOUTS
from coordinator.fleet import Fleet
from coordinator.membership import Membership, StaleRequestError
from coordinator.planning.cost_book import fitted
from coordinator.planning.device_plan import DevicePlan
from coordinator.quorum import Quorum, Verdict
from coordinator.registry import Member, Stage
from coordinator.settings import DeviceRules
from shared.clock import Clock
from shared.errors import PlanError
from shared.protocol.messages import DeviceId, Prepared, Ready, Refusal

logger = logging.getLogger(__name__)


class Assigner:
    """Gives members their parts. Belongs to the owner's thread."""

    def __init__(
        self, rules: DeviceRules, *, members: Membership, fleet: Fleet, clock: Clock
    ) -> None:
        """Start with nothing assigned."""
        self._rules = rules
        self._members = members
        self._fleet = fleet
        self._clock = clock
        self._quorum = Quorum(rules, clock.monotonic_s())

    # --- what members say ---------------------------------------------------------------------

    def ready(self, member: Member, request: Ready) -> None:
        """Note that a member waits for a part, and what it knows of itself.

        Raises:
            PlanError: it cannot carry the part that it must have, or what it measured cannot be.
        """
        if request.measurements is not None:
            fitted(request.measurements)  # before anybody counts with them
        member.data, member.measurements = request.data, request.measurements
        member.waiting = request.call
        member.stage = Stage.READY
        if request.overloaded is not None and member.plan is not None:
            self._lighten(member, request.overloaded)

    def prepared(self, member: Member, request: Prepared) -> None:
        """Note that a member holds its part, or find another for it.

        Raises:
            StaleRequestError: it speaks of another plan than its last, or took too long.
            PlanError: it cannot hold the part that it must have.
        """
        if member.stage is not Stage.PREPARING or request.plan_version != member.plan_version:
            raise StaleRequestError(f"plan {request.plan_version} is not the one to prepare")
        member.waiting = request.call
        if request.refused is not None:
            self._lighten(member, request.refused)
            return
        member.stage = Stage.PREPARED
        member.changing = False
        logger.info("%s is prepared", member.device_id)

    def _lighten(self, member: Member, reason: str) -> None:
        assert member.plan is not None  # that is what it could not prepare
        tried = member.plan.split_layer
        logger.warning("%s cannot hold split layer %d: %s", member.device_id, tried, reason)
        member.most_blocks = tried - 1
        member.stage = Stage.READY
        if tried == 1 or not self._fleet.is_planned(member.device_id):
            member.stage, member.waiting = Stage.JOINED, None
            raise PlanError(f"{member.device_id} cannot hold split layer {tried}: {reason}")

    # --- giving parts -------------------------------------------------------------------------

    def assign_if_due(self) -> None:
        """Give parts to those who wait for one: stated parts at once, planned ones together."""
        ready = [member for member in self._members.registry if member.stage is Stage.READY]
        stated = [one for one in ready if not self._fleet.is_planned(one.device_id)]
        planned = [one for one in ready if self._fleet.is_planned(one.device_id)]
        if stated:
            self._give(stated)
        if planned and self._may_plan():
            self._give(planned)

    def _may_plan(self) -> bool:
        """Tell whether all are there that the first plan waits for; later ones wait for nobody."""
        known = [m for m in self._members.registry if m.stage is not Stage.JOINED]
        least = 1 if self._fleet.latest is not None else self._rules.min
        now = self._clock.monotonic_s()
        verdict = self._quorum.judge(len(known), on_their_way=[], least=least, now_s=now)
        return verdict is Verdict.START

    def _give(self, ready: Collection[Member]) -> None:
        others = [m for m in self._members.registry if m not in ready and m.plan is not None]
        try:
            outcome = self._fleet.plan(ready, others=others)
        except PlanError as error:
            self._turn_away({member.device_id: str(error) for member in ready})
            return
        self._turn_away(outcome.refused)
        for member in ready:
            if member.device_id in outcome.plans:
                self._assign(member, outcome.plans[member.device_id])

    def _turn_away(self, refused: Mapping[DeviceId, str]) -> None:
        for member in list(self._members.registry):
            reason = refused.get(member.device_id)
            if reason is None or member.waiting is None or member.stage is not Stage.READY:
                continue
            logger.warning("%s is refused: %s", member.device_id, reason)
            call, member.waiting, member.stage = member.waiting, None, Stage.JOINED
            refusal = Refusal(call=call, code="does_not_fit", reason=reason[:4000])
            self._members.answer(member, refusal)

    def _assign(self, member: Member, plan: DevicePlan) -> None:
        assert member.waiting is not None  # its `Ready`, or the result of its last round
        before = member.plan
        keep = not member.fresh and before is not None and before.split_layer == plan.split_layer
        member.plan = plan
        member.plan_version += 1
        member.stage = Stage.PREPARING
        member.fresh = not keep
        call, member.waiting = member.waiting, None
        part = answers.assignment(call, plan, member.plan_version, keep=keep)
        self._members.answer(member, part)

    # --- changing parts -----------------------------------------------------------------------

    def rearrange(self, *, round_: int, steps_left: int) -> None:
        """Propose other parts to those who handed in round ``round_`` and wait for the next."""
        members = [member for member in self._members.registry if member.plan is not None]
        waiting = [one for one in members if one.stage is Stage.PREPARED and not one.fresh]
        others = [one for one in members if one not in waiting]
        plans = self._fleet.replan(waiting, others=others, round_=round_, steps_left=steps_left)
        for member in waiting:
            if member.device_id in plans:
                # It may have waited long for slower ones: its time to prepare begins now.
                member.changing = True
                member.asked_s = member.changing_s = self._clock.monotonic_s()
                self._assign(member, plans[member.device_id])

    @property
    def is_changing(self) -> bool:
        """Whether the next round should wait for members that prepare another part for it."""
        now, quiet_s = self._clock.monotonic_s(), self._rules.step_timeout_s
        for member in self._members.registry:
            asks_nothing = now - member.asked_s > quiet_s
            asks_for_ever = now - member.changing_s > MOST_TIMEOUTS * quiet_s
            if member.changing and (asks_nothing or asks_for_ever):
                logger.warning("%s prepares its new part for too long", member.device_id)
                # It misses a hand-back, so whatever it keeps is of no use any more.
                member.changing, member.stage, member.fresh = False, Stage.JOINED, True
        return any(member.changing for member in self._members.registry)
