"""Fault plans for `shared.transport.memory`: seeded odds for each kind, or the n-th of a kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shared.transport.memory import Faults, NoFaults, Parcel

KINDS = (
    "activations", "gradients", "requests", "commands", "adapter", "handback", "weights",
    "telemetry", "status",
)  # fmt: skip
"""Every kind of parcel in a run."""
DISTURBANCES: Mapping[str, Mapping[str, float]] = {
    "drop": {"drop": 0.15},
    "delay": {"delay": 0.3, "delay_s": 4.0},
    "duplicate": {"duplicate": 0.4, "delay_s": 8.0},
    "reorder": {"reorder": 0.5},
    "all": {"drop": 0.08, "delay": 0.1, "duplicate": 0.15, "reorder": 0.2, "delay_s": 8.0},
}
"""Odds for `RandomFaults` by name."""
RETAINED_STATE = frozenset({"status"})
"""Never disturbed by odds: a status is lost with its link, not alone."""


@dataclass
class RandomFaults:
    """Lose, double and delay parcels at random, the same way for the same seed.

    ``drop``, ``duplicate`` and ``delay`` are probabilities; a delayed copy comes up to
    ``delay_s`` seconds late, so what was sent after it overtakes it. ``reorder`` is the
    probability of a delay just long enough to be overtaken. ``kinds`` narrows it all down.
    """

    seed: int
    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0
    delay_s: float = 2.0
    kinds: frozenset[str] | None = None
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def delays_s(self, parcel: Parcel) -> Sequence[float]:
        """Draw the fate of one parcel; four draws each, whatever comes out."""
        drop, duplicate, delay, reorder = (self._random.random() for _ in range(4))
        late_s = self._random.uniform(0.0, self.delay_s)
        if not self._concerns(parcel):
            return (0.0,)
        if drop < self.drop:
            return ()
        first_s = late_s if delay < self.delay else 0.001 * (reorder < self.reorder)
        return (first_s, first_s + late_s / 2) if duplicate < self.duplicate else (first_s,)

    def _concerns(self, parcel: Parcel) -> bool:
        if self.kinds is not None:
            return parcel.kind in self.kinds
        return parcel.kind not in RETAINED_STATE


@dataclass
class Latency:
    """Let every parcel be ``latency_s`` on its way, so that time passes; more where it goes wrong.

    Without it a run without losses takes no time at all, and nothing late could come into it.
    """

    otherwise: Faults = field(default_factory=NoFaults)
    latency_s: float = 0.1

    def delays_s(self, parcel: Parcel) -> Sequence[float]:
        """Add the latency to every copy."""
        return tuple(self.latency_s + more for more in self.otherwise.delays_s(parcel))


@dataclass
class Rule:
    """Give the ``nth`` parcel (from 1) for which ``when`` holds these delays; () loses it."""

    when: Callable[[Parcel], bool]
    delays_s: Sequence[float] = ()
    nth: int | None = 1
    """None: every such parcel."""
    seen: int = 0

    def decide(self, parcel: Parcel) -> Sequence[float] | None:
        """Return the delays where this rule concerns the parcel, else None."""
        if not self.when(parcel):
            return None
        self.seen += 1
        return self.delays_s if self.nth in (None, self.seen) else None


@dataclass
class ScriptedFaults:
    """The first rule that concerns a parcel decides; others go on to ``otherwise``."""

    rules: Sequence[Rule]
    otherwise: Faults = field(default_factory=NoFaults)

    def delays_s(self, parcel: Parcel) -> Sequence[float]:
        """Ask every rule, so that each counts what it sees, and follow the first."""
        decisions = [rule.decide(parcel) for rule in self.rules]
        for decision in decisions:
            if decision is not None:
                return decision
        return self.otherwise.delays_s(parcel)


def drop_nth(kind: str, nth: int) -> Rule:
    """Lose the ``nth`` parcel of one kind: ``drop_nth("activations", 3)``."""
    return Rule(lambda parcel: parcel.kind == kind, (), nth)


def duplicate_nth(kind: str, nth: int, *, after_s: float = 0.0) -> Rule:
    """Deliver the ``nth`` parcel of one kind twice, the second ``after_s`` seconds later."""
    return Rule(lambda parcel: parcel.kind == kind, (0.0, after_s), nth)


def delay_nth(kind: str, nth: int, *, by_s: float) -> Rule:
    """Hold the ``nth`` parcel of one kind back for ``by_s`` seconds."""
    return Rule(lambda parcel: parcel.kind == kind, (by_s,), nth)
