"""Everything that can happen to a run, by name.

A fault acts, waits for some seconds (it yields them), and puts right what it has put wrong. What
has ended by then it leaves alone: another fault may have come first, or the run may be over.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from tests.testbed.chaos.bed import COORDINATOR, DEVICES, LOST_AFTER_S, STEP_TIMEOUT_S, Bed
from tests.testbed.chaos.disorder import Odds

Act: TypeAlias = Callable[[Bed], Iterator[float]]
BRIEF_S = (0.2, 1.5)
"""Shorter than any deadline of the run, on a machine with time."""
LONG_S = (max(LOST_AFTER_S, STEP_TIMEOUT_S) + 0.5, max(LOST_AFTER_S, STEP_TIMEOUT_S) + 3)
JUMPS_S = (5, 3600, 86400 * 365)
DISK_FULL = 18
"""The exit code of a StorageError."""


@dataclass(frozen=True)
class Fault:
    """``who``: what it befalls. ``is_for_good``: the run goes on without that."""

    name: str
    who: str
    act: Act
    is_for_good: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.who})"


# --- processes ------------------------------------------------------------------------------------


def killed(who: str, number: signal.Signals, *, back_after_s: float | None) -> Act:
    """End a program; start it again, where that is wanted."""

    def act(bed: Bed) -> Iterator[float]:
        if bed.kill(who, number) and back_after_s is not None:
            yield back_after_s
            bed.start(who)

    return act


def stopped(who: str, for_s: float) -> Act:
    """Let a program stand still, as under a debugger or in a laptop that sleeps."""

    def act(bed: Bed) -> Iterator[float]:
        program = bed.programs[who]
        program.send(signal.SIGSTOP)
        yield for_s
        program.send(signal.SIGCONT)

    return act


# --- the network ----------------------------------------------------------------------------------


def broker_restarted(down_s: float) -> Act:
    """Kill the broker, which forgets everything, and start it again."""

    def act(bed: Bed) -> Iterator[float]:
        if bed.kill_broker():
            yield down_s
            bed.start_broker()

    return act


def link_disturbed(who: str, how: str, for_s: float) -> Act:
    """Cut, stall, slow down or disorder a link; then let it be as before."""

    def act(bed: Bed) -> Iterator[float]:
        link = bed.links[who]
        _DISTURB[how](link)
        yield for_s
        link.mend()

    return act


_DISTURB = {
    "cut": lambda link: link.cut(),
    "unplugged": lambda link: link.stall(),
    "slow": lambda link: link.slow(60_000.0),
    "disordered": lambda link: link.disorder(Odds(twice=0.3, late=0.2)),
}


# --- the machine ----------------------------------------------------------------------------------


def clock_jumped(who: str, ahead_s: int) -> Act:
    """Set a program's wall clock, for good."""

    def act(bed: Bed) -> Iterator[float]:
        bed.clock_of(who).set_ahead(ahead_s)
        yield from ()

    return act


def disk_full(clear_after_s: float) -> Act:
    """Fill the coordinator's disk; when it has given up, make room and start it again."""

    def act(bed: Bed) -> Iterator[float]:
        program = bed.programs[COORDINATOR]
        if bed.disk is None or not program.runs:
            return
        bed.disk.fill()
        waited_s = 0.0
        while program.runs and waited_s < 20:
            yield 0.1
            waited_s += 0.1
        yield clear_after_s
        bed.disk.clear()
        yield 1.0  # another fault may just have started it
        if bed.programs[COORDINATOR].code == DISK_FULL:
            bed.start(COORDINATOR)

    return act


# --- drawing --------------------------------------------------------------------------------------


Draw: TypeAlias = Callable[[Random, str], Fault]


def _span(random: Random, bounds: tuple[float, float]) -> float:
    return round(random.uniform(*bounds), 2)


def _kill(name: str, number: signal.Signals) -> Draw:
    return lambda random, who: Fault(
        name, who, killed(who, number, back_after_s=_span(random, (0.0, 2.0)))
    )


def _stop(name: str, bounds: tuple[float, float]) -> Draw:
    return lambda random, who: Fault(name, who, stopped(who, _span(random, bounds)))


def _disturb(name: str, how: str, bounds: tuple[float, float]) -> Draw:
    return lambda random, who: Fault(name, who, link_disturbed(who, how, _span(random, bounds)))


_ANY: Mapping[str, Draw] = {
    "killed": _kill("killed", signal.SIGKILL),
    "terminated": _kill("terminated", signal.SIGTERM),
    "stopped briefly": _stop("stopped briefly", BRIEF_S),
    "stopped for long": _stop("stopped for long", LONG_S),
    "link cut": _disturb("link cut", "cut", BRIEF_S),
    "link cut for long": _disturb("link cut for long", "cut", LONG_S),
    "unplugged briefly": _disturb("unplugged briefly", "unplugged", BRIEF_S),
    "unplugged for long": _disturb("unplugged for long", "unplugged", LONG_S),
    "slow link": _disturb("slow link", "slow", (1.0, 3.0)),
    "clock jumped": lambda random, who: Fault(
        "clock jumped", who, clock_jumped(who, random.choice((-1, 1)) * random.choice(JUMPS_S))
    ),
    "packets twice and late": _disturb("packets twice and late", "disordered", (1.0, 4.0)),
}
_SPECIAL: Mapping[str, Draw] = {
    "broker restarted": lambda random, _: Fault(
        "broker restarted", "broker", broker_restarted(_span(random, (0.0, 3.0)))
    ),
    "gone for good": lambda _, who: Fault(
        "gone for good", who, killed(who, signal.SIGKILL, back_after_s=None), is_for_good=True
    ),
    "disk full": lambda random, _: Fault(
        "disk full", COORDINATOR, disk_full(_span(random, (0.0, 1.0)))
    ),
}
KINDS = (*_ANY, *_SPECIAL)


def draw(random: Random, kind: str) -> Fault:
    """Return a fault of this kind, which befalls one of those that it may befall."""
    who = random.choice((COORDINATOR, *DEVICES) if kind in _ANY else DEVICES)
    return (_ANY | _SPECIAL)[kind](random, who)
