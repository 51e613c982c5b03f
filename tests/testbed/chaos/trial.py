"""One run under one schedule, from the first start to the last exit code."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.testbed.chaos.bed import COORDINATOR, DEVICES, PATIENT, QUICK, Bed, Material
from tests.testbed.chaos.faults import Fault
from tests.testbed.chaos.programs import Starter
from tests.testbed.chaos.schedule import Schedule, Strike

LONGEST_S = 300.0
"""A run of some seconds that has not ended by then, faults and all, never does."""
AFTER_THE_END_S = 5.0
LOOK_EVERY_S = 0.01


@dataclass
class Under:
    """A fault that is under way: when it goes on, and how."""

    due_s: float
    going_on: Iterator[float]


@dataclass
class Conductor:
    """Strikes when it is time, and carries every fault on to its end."""

    bed: Bed
    waiting: list[Strike]
    timed: list[tuple[float, Fault]] = field(default_factory=list)
    under_way: list[Under] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    reached: int = -2

    def turn(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        self._notice(now)
        for due_s, fault in [one for one in self.timed if one[0] <= now]:
            self.timed.remove((due_s, fault))
            self.struck.append(fault.name)
            self.under_way.append(Under(now, fault.act(self.bed)))
        for one in [one for one in self.under_way if one.due_s <= now]:
            self._go_on(one)

    def put_right(self) -> None:
        """Let every fault that is under way come to its end at once."""
        for one in self.under_way:
            for _ in one.going_on:
                pass
        self.under_way.clear()

    def _notice(self, now: float) -> None:
        if not self.waiting:
            return
        self.reached = max(self.reached, self.bed.step())
        for strike in [one for one in self.waiting if one.step <= self.reached]:
            self.waiting.remove(strike)
            self.timed.append((now + strike.delay_s, strike.fault))

    def _go_on(self, one: Under) -> None:
        try:
            one.due_s = time.monotonic() + next(one.going_on)
        except StopIteration:
            self.under_way.remove(one)


@dataclass
class Trial:
    """What a run came to; ``outcome``: its folder.

    ``codes``: of the last start of each program, None where it did not end. ``struck``: the faults
    that came to pass. ``ended``, ``notes``, ``kept``: as in `Bed`.
    """

    schedule: Schedule
    outcome: Path
    seconds: float
    struck: list[str]
    codes: dict[str, int | None]
    ended: list[tuple[str, int | None]]
    notes: list[str]
    kept: dict[int, list[str]]


def run(schedule: Schedule, material: Material, folder: Path, starter: Starter) -> Trial:
    """Carry it out in an empty folder; all processes have ended when it returns."""
    began_s = time.monotonic()
    bed = Bed(
        material,
        folder,
        starter,
        optimizer=schedule.optimizer,
        labels=schedule.labels,
        rules=PATIENT if schedule.patient else QUICK,
        seed=schedule.seed,
    )
    with bed:
        if schedule.needs_disk:
            bed.on_small_disk()
        for name in (COORDINATOR, *DEVICES):
            bed.start(name)
        conductor = Conductor(bed, list(schedule.strikes))
        _drive(conductor, began_s + LONGEST_S)
        codes = _ends(bed, conductor)
        seconds = time.monotonic() - began_s
        outcome = folder / "outcome"
        shutil.copytree(bed.run_folder, outcome)  # its own disk is gone in a moment
        return Trial(
            schedule,
            outcome,
            seconds,
            struck=conductor.struck,
            codes=codes,
            ended=bed.ended,
            notes=bed.notes,
            kept=bed.kept,
        )


def _drive(conductor: Conductor, deadline_s: float) -> None:
    bed = conductor.bed
    while time.monotonic() < deadline_s:
        conductor.turn()
        bed.supervise()
        coordinator = bed.programs[COORDINATOR]
        if coordinator.code == 0:
            return
        if not coordinator.runs and not conductor.under_way and not conductor.timed:
            return  # it gave up, and nobody starts it again
        time.sleep(LOOK_EVERY_S)


def _ends(bed: Bed, conductor: Conductor) -> dict[str, int | None]:
    """Put everything right; return how each program ended.

    An agent that was away when the run ended waits for the next coordinator, as it should.
    """
    if bed.programs[COORDINATOR].code is None:
        return {name: program.code for name, program in bed.programs.items()}
    conductor.put_right()
    deadline_s = time.monotonic() + AFTER_THE_END_S
    agents = [bed.programs[device] for device in DEVICES]
    for agent in agents:
        agent.wait(max(0.0, deadline_s - time.monotonic()))
    for agent in agents:
        bed.kill(agent.name, signal.SIGTERM)
    return {name: program.code for name, program in bed.programs.items()}
