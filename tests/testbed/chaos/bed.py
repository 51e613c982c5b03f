"""One run in its bed: broker, coordinator, three unequal agents, and a link that each may lose."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.brokers import Mosquitto
from tests.support.outcomes import LEARNING_RATE, PLANS
from tests.support.simulation import write_model, write_text
from tests.testbed.chaos.clocks import WallClock
from tests.testbed.chaos.disk import Disk, small_disk
from tests.testbed.chaos.links import Link, Links
from tests.testbed.chaos.programs import Program, Starter

ROUNDS, STEPS = 3, 3
DEVICES = tuple(PLANS)
LINES = 16
EVALUATION_FRACTION = 0.25
KEEPALIVE_S = 2
LOST_AFTER_S, STEP_TIMEOUT_S = 2.5, 4.0
QUICK: Mapping[str, float] = {
    "wait_s": 12.0,
    "lost_after_s": LOST_AFTER_S,
    "step_timeout_s": STEP_TIMEOUT_S,
}
"""Rules that soon give a device up, and on a busy machine some that nobody has disturbed."""
PATIENT: Mapping[str, float] = dict.fromkeys(QUICK, 1e6)
"""Rules that give nobody up but those whose link broke and stays so."""
COORDINATOR = "coordinator"
RUN_FAILED = 1
"""An agent's exit code where the coordinator gave the run up."""


@dataclass(frozen=True)
class Material:
    """What all runs have in common: the base model and each device's text."""

    folder: Path

    @classmethod
    def written(cls, folder: Path) -> Material:
        """Write it into an empty folder."""
        write_model(folder / "base", "gpt2", n_layer=4)
        for number, device in enumerate(DEVICES):
            write_text(folder / f"{device}.jsonl", lines=LINES, seed=number)
        return cls(folder)

    def settings(
        self, run_folder: Path, *, optimizer: str, labels: str, rules: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the run's settings, but for its broker."""
        return {
            "run": {"id": run_folder.name, "folder": str(run_folder.parent)},
            "model": {"name": str(self.folder / "base")},
            "devices": {
                "min": 2,
                "expected": len(DEVICES),
                "join_timeout_s": 60,
                **rules,
            },
            "rounds": {"count": ROUNDS, "steps": STEPS},
            "plan": {
                "batch": 4,
                "micro_batch": 2,
                "devices": {name: dict(own) for name, own in PLANS.items()},
            },
            "lora": {"r": 8, "target_modules": ["c_attn", "c_fc"]},
            "optimizer": {"name": optimizer, "learning_rate": LEARNING_RATE[optimizer]},
            # Three devices are too few to say which of them is the odd one out.
            "aggregation": {"outlier_factor": None},
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
            "report_to": [],
            "threads": 1,
        }


@dataclass
class Bed:
    """A context manager that leaves no process behind. ``notes``: what went wrong already.

    ``ended``: the programs that were started anew, with their exit codes. ``kept``: by the last
    step that a checkpoint covered when the coordinator was killed, the lines of metrics.jsonl
    that no restart may change.
    """

    material: Material
    folder: Path
    starter: Starter
    optimizer: str = "sgd"
    labels: str = "device"
    rules: Mapping[str, float] = field(default_factory=lambda: QUICK)
    seed: int = 0
    programs: dict[str, Program] = field(default_factory=dict)
    ended: list[tuple[str, int | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: dict[int, list[str]] = field(default_factory=dict)
    disk: Disk | None = None

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "chaos"

    def __enter__(self) -> Bed:
        self.run_folder.parent.mkdir(parents=True)
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.broker = stack.enter_context(Mosquitto(self.folder))
            self._network = stack.enter_context(Links(self.broker.port, self.seed))
            self.links: Mapping[str, Link] = {
                name: self._network.open() for name in (COORDINATOR, *DEVICES)
            }
            stack.callback(self._close_programs)
            self._stack = stack.pop_all()
        self._write_run_file()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_small_disk(self) -> None:
        """Let the run's folder be on a file system of its own; call before the first start."""
        self.disk = self._stack.enter_context(small_disk(self.run_folder.parent))

    def _close_programs(self) -> None:
        for program in self.programs.values():
            program.close()

    def _write_run_file(self) -> None:
        settings = self.material.settings(
            self.run_folder, optimizer=self.optimizer, labels=self.labels, rules=self.rules
        )
        broker = {"url": self.links[COORDINATOR].url, "keepalive_s": KEEPALIVE_S}
        (self.folder / "run.yaml").write_text(yaml.safe_dump({**settings, "broker": broker}))

    def kill_broker(self) -> bool:
        """Kill the broker; False where it is dead already."""
        if not self._network.has_broker:
            return False
        self.broker.kill()
        self._network.lose_broker()
        return True

    def start_broker(self) -> None:
        """Start it again, on the same port."""
        self.broker.start()
        self._network.find_broker()

    # --- programs -----------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start the coordinator (which goes on where it can), or an agent."""
        if name in self.programs:
            self.ended.append((name, self.programs[name].code))
        if name == COORDINATOR:
            arguments = ["run", str(self.folder / "run.yaml"), "--resume"]
        else:
            arguments = self._agent(name)
        self.programs[name] = self.starter.start(
            COORDINATOR if name == COORDINATOR else "agent",
            [*arguments, "--log-level", "info"],
            name=name,
            log=self.folder / f"{name}.log",
            environment={
                "HSPLIT_BROKER__KEEPALIVE_S": str(KEEPALIVE_S),
                "XDG_CACHE_HOME": str(self.material.folder / "cache"),
                **self.clock_of(name).environment,
            },
        )

    def clock_of(self, name: str) -> WallClock:
        """Return the wall clock of one program, whichever start of it."""
        return WallClock(self.folder / f"{name}.clock")

    def _agent(self, name: str) -> list[str]:
        own = self.folder / name
        return [
            *("run", "--broker", self.links[name].url, "--device-id", name),
            *("--data", str(self.material.folder / f"{name}.jsonl")),
            *("--evaluation-fraction", str(EVALUATION_FRACTION), "--threads", "1"),
            *("--state-folder", str(own), "--cache-folder", str(own / "cache")),
            *(("--share-labels",) if self.labels == "server" else ()),
        ]

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """End a program by a signal and wait for it; False where it had ended before."""
        program = self.programs[name]
        if not program.runs:
            return False
        if name == COORDINATOR:
            self._note_what_is_acknowledged()
        program.send(number)
        program.send(signal.SIGCONT)  # it may have been stopped, and hears nothing then
        if program.wait(30) is None:
            program.close()
            self.notes.append(f"{name} did not end by {number.name} within 30 s")
        return True

    def supervise(self) -> None:
        """Start agents again that the coordinator told of its failure, as systemd would."""
        for device in DEVICES:
            if self.programs[device].code == RUN_FAILED:
                self.start(device)

    # --- what the run shows -------------------------------------------------------------------

    def lines(self) -> list[str]:
        """Return the whole lines of metrics.jsonl."""
        path = self.run_folder / "metrics.jsonl"
        if not path.exists():
            return []
        return path.read_text().rpartition("\n")[0].splitlines()

    def step(self) -> int:
        """Return the last step that was closed; -1 before the first round is under way."""
        entries = [json.loads(line) for line in self.lines()]
        shown = ("train/loss", "eval/loss")
        return max((e["step"] for e in entries if any(name in e for name in shown)), default=-1)

    def acknowledged_step(self) -> int:
        """Return the last step that a checkpoint covers."""
        found = (self.run_folder / "checkpoints").glob("round-*")
        return max((int(path.name[6:]) * STEPS for path in found), default=0)

    def _note_what_is_acknowledged(self) -> None:
        """Keep the lines that no restart may change."""
        step = self.acknowledged_step()
        trained = [line for line in self.lines() if "train/loss" in json.loads(line)]
        self.kept[step] = [line for line in trained if json.loads(line)["step"] <= step]
