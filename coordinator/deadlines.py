"""How long a round waits for each device: several times what its plan predicts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from coordinator.handback import HandBack
from coordinator.planning.device_plan import DevicePlan
from coordinator.registry import Member
from coordinator.rounds import Allowance
from coordinator.settings import DeviceRules
from shared.protocol.messages import DeviceId

MOST_TIMEOUTS: Final = 10.0
"""Nothing, and no claim of a device about itself, makes a step, an evaluation or a change of parts
wait for more `step_timeout_s`; one that trains alone has all steps of its round at once."""


def allowances(
    members: Sequence[Member],
    *,
    handed: HandBack,
    step_s: Mapping[DeviceId, float],
    steps: int,
    probe_sequences: int,
    rules: DeviceRules,
) -> Mapping[DeviceId, Allowance]:
    """Return how long a round of ``steps`` steps waits for each of ``members``.

    ``handed``: what they start from. ``step_s``: what a step is predicted to take each device
    that measured itself, its link included. ``probe_sequences``: what each probes before its
    first step.
    """
    return {
        member.device_id: allowance(
            member.plan,
            predicted_s=step_s.get(member.device_id),
            evaluation_sequences=member.profile.evaluation_sequences,
            steps=steps,
            probe_sequences=probe_sequences,
            rules=rules,
            carried_s=_carried_s(member, handed),
        )
        for member in members
        if member.plan is not None
    }


def allowance(
    plan: DevicePlan,
    *,
    predicted_s: float | None,
    evaluation_sequences: int,
    steps: int,
    probe_sequences: int,
    rules: DeviceRules,
    carried_s: tuple[float, float] = (0.0, 0.0),
) -> Allowance:
    """Return how long a round waits for the device that follows ``plan``.

    A predicted step may take ``rules.late_factor`` times as long as predicted, and
    ``rules.late_after_s`` in any case: a first one compiles, reads from disk, fills caches. A
    sequence that is evaluated or probed counts as one that is trained on. What the device starts
    from must reach it, and what it delivers must come back: ``carried_s``, as its link was
    measured, may take as many times as long, and comes on top. Without a prediction a device may
    use up the whole of what nobody may exceed.
    """
    most_s = MOST_TIMEOUTS * rules.step_timeout_s

    def seconds(sequences: int) -> float:
        if predicted_s is None:
            return most_s
        times = rules.late_factor * sequences / plan.batch
        return min(most_s, max(rules.late_after_s, times * predicted_s))

    first_s, step_s = seconds(plan.batch + probe_sequences), seconds(plan.batch)
    down_s, up_s = (rules.late_factor * one for one in carried_s)
    hand_in_s = min(most_s - step_s, up_s)
    return Allowance(
        quiet_s=rules.step_timeout_s,
        # A device measures importance before it hands in its evaluation (or, as the protocol lets
        # it, after that).
        evaluate_s=min(most_s, seconds(evaluation_sequences + probe_sequences) + down_s),
        first_step_s=first_s,
        step_s=step_s,
        hand_in_s=hand_in_s,
        alone_s=first_s + max(0, steps - 1) * step_s + hand_in_s,
    )


def _carried_s(member: Member, handed: HandBack) -> tuple[float, float]:
    """Return how long the hand-back and what is delivered take over a member's link, each."""
    link = None if member.measurements is None else member.measurements.link
    if link is None:
        return (0.0, 0.0)
    down = handed.bytes_to(member.device_id) / link.downlink_bytes_per_s
    return (down, handed.bytes_from(member.device_id) / link.uplink_bytes_per_s)
