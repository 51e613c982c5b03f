"""When a fleet's parts change: only for a gain that lasts, and not too often. Pure.

The adaptive half of ARMSC (arXiv:2505.02795): a threshold on the change of importance holds ranks
steady, a threshold on the gain holds the cuts; the figures are *ours*. A change costs every
device the time that the slowest takes to prepare, and moments of the optimizer, so a plan that is
as good as the noise of its measurements stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from coordinator.planning.device_plan import DevicePlan
from coordinator.planning.prediction import Prediction
from shared.protocol.messages import DeviceId

Why: TypeAlias = Literal["memory", "slower", "gain", "importance"]

LEAST_GAIN = 0.05
"""A step must become shorter by this share."""
LEAST_ROUNDS_APART = 3
IMPORTANCE_CHANGE = 0.1
"""δ: how much of all importance must be elsewhere before ranks follow."""
URGENT_SLOWDOWN = 1.5
NOISE = 1.15
"""A device is as fast as was assumed where it differs by less: measurements repeat within 5 %,
and what was assumed was such a measurement too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One device under the plan that it follows.

    ``assumed_slowdown``: what the plan counted on; ``slowdown``: as it is. ``memory_limit_bytes``:
    what it may use now, ``needed_bytes``: what its part needs. ``switch_s``: until it could work
    under the proposed part (`switch_seconds`).
    """

    plan: DevicePlan
    assumed_slowdown: float
    slowdown: float
    memory_limit_bytes: int | None = None
    needed_bytes: float = 0.0
    switch_s: float = 0.0

    @property
    def lacks_memory(self) -> bool:
        """Whether it lost memory that its part needs."""
        return self.memory_limit_bytes is not None and self.needed_bytes > self.memory_limit_bytes

    @property
    def is_much_slower(self) -> bool:
        """Whether it cannot wait for the next time that plans may change."""
        return self.slowdown > URGENT_SLOWDOWN * self.assumed_slowdown


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The best plan for what is known now, and both plans' steps under what is known now."""

    plans: Mapping[DeviceId, DevicePlan]
    prediction: Prediction
    current: Prediction

    @property
    def gain_s(self) -> float:
        """Seconds that each step becomes shorter."""
        return self.current.step_s - self.prediction.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What came before, and what is left.

    ``rounds_since_change``: aggregations since any part changed. ``importance_change``: since
    ranks were last set, 0 to 1. ``steps_left``: of the run.
    """

    rounds_since_change: int
    importance_change: float
    steps_left: int

    @property
    def has_rested(self) -> bool:
        """Whether the last change is long enough ago for another."""
        return self.rounds_since_change >= LEAST_ROUNDS_APART

    @property
    def may_rank(self) -> bool:
        """Whether ranks follow importance now."""
        return self.has_rested and self.importance_change > IMPORTANCE_CHANGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The parts that change, and why; none where everything stays."""

    plans: Mapping[DeviceId, DevicePlan]
    why: Why | None = None


def decide(
    standing: Mapping[DeviceId, Standing], proposal: Proposal, *, history: History
) -> Decision:
    """Return which devices get another part now.

    Cuts and batches belong together (what one device gives up another takes), so they change
    together: at once where a device lost memory that it needs; where the gain is worth it, at
    least `LEAST_ROUNDS_APART` aggregations after the last change, or at once where a device is
    much slower than was assumed. Ranks follow importance, at the same distance.
    """
    both = {device: one for device, one in standing.items() if device in proposal.plans}
    why = _why_cut(both, proposal, history)
    changed: dict[DeviceId, DevicePlan] = {}
    for device, one in both.items():
        proposed = proposal.plans[device]
        plan = _merged(one, proposed, new_cut=why is not None, new_ranks=history.may_rank)
        if plan != one.plan:
            changed[device] = plan
    if not changed:
        return Decision(plans={})
    return Decision(plans=changed, why=why or "importance")


def assumed(before: float, measured: float) -> float:
    """Return the slowdown to plan with: what was assumed ``before``, unless it truly changed."""
    return before if before / NOISE <= measured <= before * NOISE else measured


def switch_seconds(
    now: DevicePlan,
    then: DevicePlan,
    *,
    block_bytes: float,
    downlink_bytes_per_s: float | None,
    load_s: float,
) -> float:
    """Return how long a device needs to change its part: blocks to fetch, and to load it anew.

    ``load_s`` where blocks change; a batch or ranks alone change in no time. Blocks that the
    device may have on its disk count too.
    """
    if now.split_layer == then.split_layer:
        return 0.0
    more = max(0, then.split_layer - now.split_layer)
    fetch_s = 0.0 if downlink_bytes_per_s is None else more * block_bytes / downlink_bytes_per_s
    return load_s + fetch_s


def _why_cut(
    standing: Mapping[DeviceId, Standing], proposal: Proposal, history: History
) -> Why | None:
    """Return why cuts and batches change; None: they stay."""
    if any(one.lacks_memory for one in standing.values()):
        return "memory"
    slower = any(one.is_much_slower for one in standing.values())
    if not (history.has_rested or slower):
        return None
    if proposal.gain_s <= LEAST_GAIN * proposal.current.step_s:
        return None
    # All wait for the slowest to prepare.
    cost_s = max((one.switch_s for one in standing.values()), default=0.0)
    if proposal.gain_s * history.steps_left <= cost_s:
        return None
    return "slower" if slower else "gain"


def _merged(
    standing: Standing, proposed: DevicePlan, *, new_cut: bool, new_ranks: bool
) -> DevicePlan:
    """Return the plan of a device with what may change of it."""
    now = standing.plan
    cut = proposed if new_cut else now
    # Other blocks, or less room, need the ranks that were chosen for them.
    follow = cut.split_layer != now.split_layer or (new_cut and standing.lacks_memory)
    if follow or (new_ranks and proposed.split_layer == now.split_layer):
        return replace(cut, ranks=proposed.ranks, scalings=proposed.scalings)
    return replace(cut, ranks=now.ranks, scalings=now.scalings)
