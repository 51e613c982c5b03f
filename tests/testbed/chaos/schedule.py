"""What happens when: drawn from one number, so that it can be drawn again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from tests.testbed.chaos import faults
from tests.testbed.chaos.bed import ROUNDS, STEPS
from tests.testbed.chaos.faults import KINDS, Fault

MOST_FAULTS = 4
JOINING = -1
"""As a step: before the first round."""


@dataclass(frozen=True)
class Strike:
    """A fault, ``delay_s`` after step ``step`` was first seen closed (0: evaluated)."""

    step: int
    delay_s: float
    fault: Fault

    def __str__(self) -> str:
        when = "while joining" if self.step == JOINING else f"after step {self.step}"
        return f"{self.fault} {when} + {self.delay_s:.2f} s"


@dataclass(frozen=True)
class Schedule:
    """One run with its faults, in order. ``seed``: what it was drawn from.

    ``patient``: the coordinator gives nobody up who can be waited for.
    """

    seed: int
    optimizer: str
    labels: str
    strikes: tuple[Strike, ...]
    patient: bool = False

    @property
    def needs_disk(self) -> bool:
        return any(strike.fault.name == "disk full" for strike in self.strikes)

    def __str__(self) -> str:
        return "; ".join(map(str, self.strikes)) or "nothing"


def drawn(seed: int, *, without: Collection[str] = ()) -> Schedule:
    """Return the schedule of this seed; kinds of faults in ``without`` are left out.

    The n-th seed has a fault of the n-th kind, so that none is forgotten.
    """
    random = Random(seed)
    kinds = [kind for kind in KINDS if kind not in without]
    chosen = [kinds[seed % len(kinds)]]
    chosen += random.choices(kinds, k=random.randrange(MOST_FAULTS))
    strikes, for_good = [], False
    for kind in chosen:
        fault = faults.draw(random, "killed" if for_good and kind == "gone for good" else kind)
        for_good |= fault.is_for_good
        step = random.randrange(JOINING, ROUNDS * STEPS)
        delay_s = random.uniform(0.0, 1.0 if step == JOINING else 0.2)
        strikes.append(Strike(step, round(delay_s, 3), fault))
    return Schedule(
        seed,
        optimizer="adamw" if random.random() < 0.25 else "sgd",
        labels="server" if random.random() < 0.25 else "device",
        strikes=tuple(sorted(strikes, key=lambda strike: (strike.step, strike.delay_s))),
    )
