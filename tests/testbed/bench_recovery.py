"""How soon a run goes on after something was killed, cut off or stopped.

Real programs over mosquitto, a tiny model, three devices of which two are enough. Faults come at
random moments within a step. What is measured is always the pause between two closed steps that
the fault lies in, less an ordinary one; a fault counts once all three devices train again.

    make bench-recovery                   BENCH_ARGS="--repeats 1 --downtimes 1 5"
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.brokers import Mosquitto
from tests.testbed.bench_report import write_report
from tests.testbed.chaos.links import Link, Links
from tests.testbed.long_run import (
    DEVICES,
    JOINED,
    READY,
    LongRun,
    Step,
    Traffic,
    over_mosquitto,
    settings,
    wait_for,
    write_files,
)

STEPS_A_ROUND = 10
VICTIM = "pi"
UNHINDERED_BYTES_PER_S = 1e9
BROKER_AIM_S, COORDINATOR_AIM_S = 5.0, 10.0
LEAST_PIECE_BYTES = 10_000
"""What the smallest front of the model weighs is far more; asking and answering is less."""


@dataclass
class Row:
    """One kind of fault. ``seconds``: its figure, once per repeat; ``notes``: what was seen."""

    fault: str
    figure: str
    aim: str
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Bench:
    """A run that goes on, and what is done to it."""

    def __init__(
        self, run: LongRun, broker: Mosquitto, traffic: Traffic, link: Link, seed: int
    ) -> None:
        self.run = run
        self._broker = broker
        self.traffic = traffic
        self._link = link
        self._random = random.Random(seed)
        self.ordinary_s = 0.0

    def start(self, *, ordinary_steps: int) -> None:
        """Start everything; measure what an ordinary step takes, by so many after ten others."""
        self.run.start_coordinator()
        for device in DEVICES:
            self._start_agent(device)
        self._wait_until_all_train()
        least = STEPS_A_ROUND + ordinary_steps
        wait_for(lambda: len(self.run.steps.read()) > least, f"{least} ordinary steps")
        times = [step.wall_s for step in self.run.steps.read()[STEPS_A_ROUND:]]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        self.ordinary_s = statistics.median(pauses)

    # --- the broker ---------------------------------------------------------------------------

    def broker_restarts(self, row: Row, downtime_s: float) -> None:
        """Kill the broker, start it again after ``downtime_s``."""
        gone = self._gone()
        self._random_moment()
        self._broker.kill()
        time.sleep(downtime_s)
        self._broker.start()
        listens_s = time.time()
        first = self._next_step(listens_s)
        row.seconds.append(first.wall_s - listens_s - self.ordinary_s)
        self._wait_until_all_train()
        lost = len(self._gone()) - len(gone)
        if lost:
            row.notes.append(f"{lost} devices were given up")

    # --- the coordinator ----------------------------------------------------------------------

    def coordinator_restarts(self, row: Row, started: list[float]) -> None:
        """Kill the coordinator, start it again; ``started``: takes how long its start-up was."""
        self._random_moment()
        self.run.coordinator.send(signal.SIGKILL)
        self.run.coordinator.wait()
        last, kept = self.run.steps.read()[-1], self.run.checkpoint_round()
        began_s = time.time()
        coordinator = self.run.start_coordinator("--resume")
        wait_for(lambda: READY in coordinator.text(), "the coordinator to be ready")
        ready_s = time.time()
        started.append(ready_s - began_s)
        first = self._next_step(ready_s)
        row.seconds.append(first.wall_s - ready_s)
        # A kill between a round's last step and its checkpoint repeats that round; never two.
        again = last.step - (first.step - 1)
        row.notes.append(f"{max(0, again)} steps repeated")
        if kept is None or first.round != kept + 1 or again > STEPS_A_ROUND:
            row.notes.append(f"WRONG: {last} before, checkpoint {kept}, {first} after")
        self._wait_until_all_train()

    # --- one of three devices -----------------------------------------------------------------

    def agent_is_killed(self, row: Row, back: Row) -> None:
        """Kill one agent, and start it again once the others have gone on."""
        agent = self.run.agents[VICTIM]
        self._hold(row, lambda: agent.send(signal.SIGKILL))
        before = self.traffic.bytes_of(VICTIM, "weights")
        began_s = time.time()
        self._start_agent(VICTIM)
        agent = self.run.agents[VICTIM]
        wait_for(lambda: JOINED in agent.text(), f"{VICTIM} to join")
        joined_s = time.time()
        wait_for(lambda: self._trains_since(VICTIM, joined_s), f"{VICTIM} to train again")
        back.seconds.append(self.traffic.last_s(VICTIM, "gradients") - joined_s)
        fetched = self.traffic.bytes_of(VICTIM, "weights") - before
        back.notes.append(f"{fetched} bytes of weights, {joined_s - began_s:.1f} s to start")
        if fetched > LEAST_PIECE_BYTES:
            back.notes.append("WRONG: the cache was not used")
        self._wait_until_all_train()

    def agent_is_unplugged(self, row: Row) -> None:
        """Let nothing pass to and from one agent, without a word."""
        self._hold(row, self._link.stall)
        self._link.mend()
        self._wait_until_all_train()

    def agent_is_frozen(self, row: Row) -> None:
        """Stop one agent's process as it stands."""
        agent = self.run.agents[VICTIM]
        self._hold(row, lambda: agent.send(signal.SIGSTOP))
        agent.send(signal.SIGCONT)
        self._wait_until_all_train()

    def agent_is_stopped(self, row: Row, ended: Row, signal_: signal.Signals) -> None:
        """Ask one agent to stop; it should say goodbye, and end. Start it again."""
        agent, gone = self.run.agents[VICTIM], self._gone()
        self._random_moment()
        began_s = time.monotonic()
        agent.send(signal_)
        wait_for(lambda: len(self._gone()) > len(gone), "the coordinator to notice")
        row.seconds.append(time.monotonic() - began_s)
        code, reason = agent.wait(), self._why_gone()
        ended.seconds.append(time.monotonic() - began_s)
        row.notes.append(f"exit code {code}, '{reason}'")
        if code != 128 + signal_ or "silent" in reason:
            row.notes.append("WRONG: no clean stop")
        self._start_agent(VICTIM)
        self._wait_until_all_train()

    def _hold(self, row: Row, fault: Any) -> None:
        """Let something happen to the victim; note how long the others were held."""
        gone = self._gone()
        self._random_moment()
        fault()
        began_s = time.time()
        wait_for(lambda: len(self._gone()) > len(gone), "the coordinator to notice")
        row.notes.append(self._why_gone())
        # The longest pause since: the fault may come just after the victim did its part.
        noticed_s = time.time()
        self._next_step(noticed_s)
        steps = [step.wall_s for step in self.run.steps.read()]
        pauses = [after - before for before, after in itertools.pairwise(steps) if after > began_s]
        row.seconds.append(max(pauses) - self.ordinary_s)

    # --- looking ------------------------------------------------------------------------------

    def _start_agent(self, device: str) -> None:
        through = ("--broker", self._link.url) if device == VICTIM else ()
        self.run.start_agent(device, *through)

    def _random_moment(self) -> None:
        self._next_step(time.time())
        time.sleep(self._random.uniform(0.0, 2 * self.ordinary_s))

    def _next_step(self, wall_s: float) -> Step:
        wait_for(lambda: self.run.first_after(wall_s) is not None, "another step")
        step = self.run.first_after(wall_s)
        assert step is not None
        return step

    def _trains_since(self, device: str, wall_s: float) -> bool:
        return self.traffic.last_s(device, "gradients") > wall_s

    def _wait_until_all_train(self) -> None:
        now = time.time()
        wait_for(lambda: all(self._trains_since(device, now) for device in DEVICES), "all to train")
        self._next_step(time.time())

    def _why_gone(self) -> str:
        return self._gone()[-1].split("is gone: ")[1].split(" [run_id=")[0]

    def _gone(self) -> list[str]:
        return [line for line in self.run.coordinator.text().splitlines() if "is gone: " in line]


def measure(bench: Bench, options: argparse.Namespace) -> tuple[list[Row], list[float]]:
    """Let everything happen so many times; return the table, and how long start-ups took."""
    aim = f"<= {BROKER_AIM_S:g}"
    brokers = {
        down: Row(f"broker down {down:g} s", "s beyond it", aim) for down in options.downtimes
    }
    resumed = Row("coordinator kill -9", "s after ready", f"<= {COORDINATOR_AIM_S:g}")
    killed, unplugged, frozen = (
        Row(f"1 of 3 agents {how}", "s others held", "one deadline")
        for how in ("kill -9", "unplugged", "SIGSTOP")
    )
    back = Row("agent started again", "s joined to training", "cache used")
    stopped = {
        signal.SIGTERM: Row("agent SIGTERM", "s to its goodbye", "143, goodbye"),
        signal.SIGINT: Row("agent Ctrl-C", "s to its goodbye", "130, goodbye"),
    }
    ended = Row("either", "s until it is gone", "torch's exit")
    started: list[float] = []
    for _ in range(options.repeats):
        for down, row in brokers.items():
            bench.broker_restarts(row, down)
        bench.coordinator_restarts(resumed, started)
        bench.agent_is_killed(killed, back)
        bench.agent_is_unplugged(unplugged)
        bench.agent_is_frozen(frozen)
        for signal_, row in stopped.items():
            bench.agent_is_stopped(row, ended, signal_)
    rows = [*brokers.values(), resumed, killed, unplugged, frozen, back, *stopped.values(), ended]
    return rows, started


@contextlib.contextmanager
def prepared(folder: Path, seed: int) -> Iterator[Bench]:
    """Yield a bench whose programs are not yet started."""
    files = write_files(folder)
    with (
        over_mosquitto(folder / "run") as (system, broker),
        Traffic(broker.port) as traffic,
        Links(broker.port, seed=0, bytes_per_s=UNHINDERED_BYTES_PER_S) as links,
    ):
        run = LongRun(system, files, settings(files, rounds=100_000, steps=STEPS_A_ROUND))
        yield Bench(run, broker, traffic, links.open(), seed)


def main() -> None:
    """Measure, print a table, write build/bench/recovery.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--downtimes", type=float, nargs="+", default=[1.0, 5.0, 20.0])
    parser.add_argument("--ordinary-steps", type=int, default=200, help="to measure one by")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder), options.seed) as bench:
        bench.start(ordinary_steps=options.ordinary_steps)
        rows, started = measure(bench, options)
    print(f"ordinary step {bench.ordinary_s * 1e3:.0f} ms; coordinator's start-up "
          f"{', '.join(f'{one:.1f}' for one in started)} s")  # fmt: skip
    for row in rows:
        seconds = "  ".join(f"{one:6.2f}" for one in row.seconds)
        print(f"{row.fault:<26}{row.figure:<22}{row.aim:<14}{seconds}")
        for note in dict.fromkeys(row.notes):
            print(f"{'':<48}{note} ({row.notes.count(note)}x)")
    found = {"ordinary_step_s": bench.ordinary_s, "start_up_s": started}
    write_report("recovery", {**found, "options": vars(options), "rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    main()
