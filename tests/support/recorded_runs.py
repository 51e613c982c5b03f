"""A run's record as the coordinator writes it, with checkpoints for a model: killed anywhere.

What "the model" learnt is a list in the checkpoint: every contribution that went into it, with a
number of target tokens that no other contribution has. So the record can be held against it.

As a program, ``python -m tests.support.recorded_runs FOLDER`` makes one run per point at which it
can be killed (SIGKILL, for real), in ``FOLDER/<number>``. With a number after that, the run goes
on after every so many of these points, and is killed again at each point of what follows.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator import checkpoints
from coordinator.checkpoints import Checkpoint
from coordinator.planning.device_plan import DevicePlan
from coordinator.registry import Member
from coordinator.rounds import CloseStep, MicroBatchDone, Round
from coordinator.run_listener import Start
from coordinator.state.run_state import RunState
from shared.protocol.messages import DeviceId, DeviceProfile, SessionId
from tests.support.fake_clock import FakeClock

DEVICES = ("nano", "orin")
ROUNDS, STEPS = 2, 2
PLAN = DevicePlan(
    split_layer=1,
    ranks={"h.0.fc": 4},
    scalings={"h.0.fc": 2.0},
    batch=4,
    micro_batch=2,
    in_flight=1,
)

Contribution = tuple[int, int, str, int]
"""Round, step, device, target tokens."""


def member(device: str, *, session: str = "aaaaaaaa-1", **changes: Any) -> Member:
    """Return a member with a plan."""
    profile = DeviceProfile(
        backend="torch", hsplit_version="1", machine="board", sequences=8, evaluation_sequences=0
    )
    values = {"plan": PLAN, **changes}
    return Member(DeviceId(device), SessionId(session), profile, 0.0, 0.0, **values)


def opened(state: RunState, number: int, *, devices: Sequence[str] = DEVICES) -> Round:
    """Open round ``number`` with these devices, of ``STEPS`` steps."""
    own = [member(device) for device in devices]
    names = {one.device_id for one in own}
    steps = STEPS if number <= ROUNDS else 0
    round_ = Round(number, first_step=(number - 1) * STEPS, steps=steps, exchanging=names)
    positions = dict.fromkeys(names, 4 * round_.first_step)
    ranks = {"h.0.fc": 8, "h.1.fc": 8}
    start = Start(members=own, alone=(), positions=positions, server_ranks=ranks)
    state.round_opened(round_, start)
    return round_


def trained(state: RunState, step: int, tokens: dict[str, tuple[int, ...]]) -> None:
    """Close a step over the target tokens of each device's micro-batches."""
    for device, each in tokens.items():
        for index, count in enumerate(each):
            done = MicroBatchDone(DeviceId(device), step, index, len(each), count)
            state.micro_batch(done)
    total = sum(sum(each) for each in tokens.values())
    devices = tuple(DeviceId(device) for device in sorted(tokens))
    state.step_closed(CloseStep(step, devices, total), applied=True)


def never() -> None:
    """Be killed nowhere."""


@dataclass
class RecordedRun:
    """One life of a coordinator: goes on from the last checkpoint in ``folder``.

    ``point`` is called at every moment at which a crash may be told from one at another.
    """

    folder: Path
    point: Callable[[], None] = never
    learnt: list[Contribution] = field(default_factory=list)

    def live(self) -> None:
        """Begin, or go on, and come to the end."""
        found = last_checkpoint(self.folder)
        self.learnt = learnt_of(found)
        resumed = None if found is None else found.round
        with RunState(self.folder, FakeClock(), resumed_round=resumed) as state:
            for device in DEVICES:
                state.joined(member(device))
            for number in range((resumed or 0) + 1, ROUNDS + 1):
                self._round(state, number)

    def _round(self, state: RunState, number: int) -> None:
        if number == 1:
            self._save(0)
        round_ = opened(state, number)
        for step in range(round_.first_step, round_.end_step):
            own = {device: (unique(), unique()) for device in DEVICES}
            trained(state, step, own)
            self.learnt += [(number, step, device, sum(each)) for device, each in own.items()]
        for device in DEVICES:
            state.delivered(DeviceId(device))
        weights = {DeviceId(d): sum(n[3] for n in self.learnt if n[2] == d) for d in DEVICES}
        state.round_closing([DeviceId(device) for device in DEVICES], weights, error=1e-9)
        self.point()
        self._save(number)
        self.point()
        state.round_closed(number)

    def _save(self, number: int) -> None:
        one = Checkpoint(
            round=number,
            step=number * STEPS,
            update={},
            server={},
            optimizer={},
            state={"learnt": self.learnt},
        )
        checkpoints.save(self.folder / "checkpoints", one, keep=3)


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint that a start would go on from."""
    return checkpoints.latest(folder / "checkpoints")


def learnt_of(checkpoint: Checkpoint | None) -> list[Contribution]:
    """Return what went into a checkpoint."""
    learnt = [] if checkpoint is None else checkpoint.state["learnt"]
    return [(number, step, device, tokens) for number, step, device, tokens in learnt]


def unique() -> int:
    """Return a number of target tokens that nothing else has, in this process or another."""
    return int.from_bytes(os.urandom(6), "big")


def killed(folder: Path, number: int) -> bool:
    """Live in ``folder`` in a process that kills itself at its point ``number``; did it?"""
    process = os.fork()
    if process == 0:
        points = itertools.count()

        def point() -> None:
            if next(points) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def before_it_is_carried_out(statement: str) -> None:
            if statement.strip(" ;") == "COMMIT":
                point()

        class Watched(sqlite3.Connection):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self.set_trace_callback(before_it_is_carried_out)

        sqlite3.connect = functools.partial(sqlite3.connect, factory=Watched)
        RecordedRun(folder, point).live()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the run in {folder} failed at its point {number}")
    return os.WIFSIGNALED(status)


def main(folder: Path, every: int | None) -> None:
    """Kill runs at every point of their first life, and of the second of ``every`` so many."""
    names = itertools.count()

    def fresh() -> Path:
        here = folder / f"{next(names):04d}"
        here.mkdir(parents=True)
        return here

    for first in itertools.count():
        if not killed(fresh(), first):
            return
        again = every is not None and first % every == every - 1
        for second in itertools.count() if again else ():
            here = fresh()
            killed(here, first)
            if not killed(here, second):
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
