"""An unequal fleet on this machine: real programs, of which the agents play smaller devices."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.prediction import predict
from coordinator.settings import CoordinatorSettings
from shared import profile_file
from shared.architecture import ModelArchitecture
from shared.protocol.messages import DeviceId
from shared.protocol.profile import DataShape, ProfileFile
from tests.support.brokers import wait_until
from tests.support.fleets import part
from tests.testbed import large_base
from tests.testbed.system import ROOT, Process, System

LENGTH = 124
"""Tokens that every sequence is computed at, so that equal batches are equal work."""
LINES = 200
RANK = 8
IN_FLIGHT = 2
SHORT_OF_MORE = 0.9
FULL = "out of memory"
"""In the words of an agent whose memory is full."""
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
RUN_TIMEOUT_S = 900.0
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of a fleet. ``speed`` is relative to the fastest of the fleet.

    ``most_sequences``: what its memory holds in a micro-batch, with one block and two of them
    in flight; None: no limit.
    """

    name: str
    speed: float
    mbit_per_s: float
    most_sequences: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the runs of a benchmark have in common: where they are, and its command line."""

    folder: Path
    url: str
    base: Path
    text: Path
    options: argparse.Namespace


@dataclass(frozen=True)
class Step:
    """One optimizer step of a run, from the step before to its own end."""

    round: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a run of a fleet did. ``plans``: the lines of its ``plans.jsonl``."""

    steps: tuple[Step, ...]
    plans: tuple[dict[str, Any], ...]

    def median_s(self, *, first_round: int, last_round: int | None = None) -> float:
        """Return the median seconds of the steps of some rounds."""
        last = last_round if last_round is not None else max(one.round for one in self.steps)
        return statistics.median(
            one.seconds for one in self.steps if first_round <= one.round <= last
        )


class RunFailedError(Exception):
    """A program of a run ended with an error; the message is the end of its log."""


def base_and_text(folder: Path) -> tuple[Path, Path]:
    """Write a model and a data file of equally long sequences; return both paths.

    Digits are a token each for the byte-level tokenizer; the end of the text is one more, which
    is only predicted.
    """
    base = large_base.write(folder / "base")
    digits = random.Random(0)
    text = folder / "text.jsonl"
    with text.open("w") as file:
        for _ in range(LINES):
            line = "".join(digits.choices("0123456789", k=LENGTH))
            file.write(json.dumps({"text": line}) + "\n")
    return base, text


def run_settings(base: Path, *, devices: int, plan: Mapping[str, Any], rounds: int, steps: int):
    """Return a ``run.yaml`` for a fleet, without its broker."""
    return {
        "model": {"name": str(base)},
        "devices": {"min": devices, "expected": devices, "join_timeout_s": RUN_TIMEOUT_S},
        "plan": dict(plan),
        "rounds": {"count": rounds, "steps": steps},
        "lora": {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(TARGETS)},
        "optimizer": {"learning_rate": 1e-4},
        "training": {"max_length": LENGTH + 1},
        "report_to": [],
        "threads": 1,
    }


def planned_plan(batch: int) -> dict[str, Any]:
    """Return the plan settings that leave everything to the planner but the mean batch."""
    return {"batch": batch, "probe_sequences": 0, "ranks": "uniform"}


def emulation(device: Device, *, scale: float, memory_bytes: int | None) -> str:
    """Return the ``--emulate`` of a device whose fleet is ``scale`` times as fast as it says."""
    parts = [f"speed={device.speed * scale:g}"]
    parts += [f"{way}={device.mbit_per_s:g}Mbit/s" for way in ("uplink", "downlink")]
    if memory_bytes is not None:
        parts.append(f"memory={memory_bytes / MIB:.0f}MiB")
    return ",".join(parts)


def profiled(folder: Path, base: Path) -> ProfileFile:
    """Return what `hsplit-agent profile` measures of this machine for a model."""
    output = folder / "profile.json"
    command = [
        *(sys.executable, "-m", "edge_agent.cli", "profile", "--model", str(base)),
        *("--micro-batch", "2", "--length", str(LENGTH), "--threads", "1"),
        *("--device-id", "profiled", "--state-folder", str(folder / "profiled")),
        *("--device", "cpu", "--output", str(output)),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return profile_file.read(output)


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """What an agent takes of memory by the coordinator's own reckoning, in a run of a fleet."""

    profile: ProfileFile
    settings: CoordinatorSettings
    architecture: ModelArchitecture

    @classmethod
    def of(cls, folder: Path, base: Path, settings: Mapping[str, Any]) -> MemoryModel:
        """Measure this machine for the model in ``base``, to reckon with a run's settings."""
        config = json.loads((base / "config.json").read_text())
        return cls(
            profile=profiled(folder, base),
            settings=CoordinatorSettings.model_validate(settings),
            architecture=ModelArchitecture.from_config(config),
        )

    def needed_bytes(self, *, split_layer: int, micro_batch: int) -> float:
        """Return what a part takes at the most, with `IN_FLIGHT` micro-batches at once."""
        device_id = DeviceId("profiled")
        plan = part(
            self.architecture,
            split_layer,
            lora=self.settings.lora,
            batch=IN_FLIGHT * micro_batch,
            micro_batch=micro_batch,
            in_flight=IN_FLIGHT,
        )
        device = FleetDevice(
            device_id=device_id,
            terms=self.settings.device_terms(device_id),
            measurements=self.profile.measurements,
            data=DataShape(mean_length=LENGTH, padded_length=LENGTH, longest=LENGTH),
        )
        conditions = Conditions.of(self.settings, self.architecture, server=None)
        found = predict({device_id: plan}, [device], conditions)
        return found.devices[device_id].memory_bytes

    def limit_bytes(self, device: Device) -> int | None:
        """Return the memory that holds a device's ``most_sequences``, just short of one more."""
        most = device.most_sequences
        if most is None:
            return None
        enough, more = (self.needed_bytes(split_layer=1, micro_batch=most + n) for n in (0, 1))
        return round(enough + SHORT_OF_MORE * (more - enough))


def start_fleet(
    system: System, text: Path, emulations: Mapping[str, str | None], settings: Mapping[str, Any]
) -> tuple[Process, dict[str, Process]]:
    """Start the coordinator and an agent for each device; None: it plays no smaller one."""
    coordinator = system.coordinator(settings)
    agents = {}
    for name, emulate in emulations.items():
        flags = ["--threads", "1", "--device", "cpu", "--evaluation-fraction", "0.01"]
        flags += [] if emulate is None else ["--emulate", emulate]
        agents[name] = system.agent(name, text, *flags)
    return coordinator, agents


def finish(
    system: System, coordinator: Process, agents: Mapping[str, Process], *, must_fit: bool = False
) -> Outcome:
    """Wait for the end of a run; return what it did.

    Raises:
        RunFailedError: a program failed, or with ``must_fit`` a device's memory was full.
    """

    def over() -> bool:
        full = [name for name, agent in agents.items() if must_fit and FULL in agent.text()]
        if full:
            raise RunFailedError(f"the memory of {', '.join(full)} is full")
        return coordinator.popen.poll() is not None

    wait_until(over, "the run to end", timeout_s=RUN_TIMEOUT_S)
    for process in (coordinator, *agents.values()):
        if process.wait():
            raise RunFailedError(f"{process.name} failed:\n{process.text()[-2000:]}")
    return read_outcome(system)


def read_outcome(system: System) -> Outcome:
    """Return what a run has done so far; the first step of a round has no step before it."""
    closed = [line for line in system.metrics() if "train/loss" in line]
    steps = tuple(
        Step(round=int(later["round"]), seconds=later["time"] - earlier["time"])
        for earlier, later in itertools.pairwise(closed)
        if earlier["round"] == later["round"]
    )
    plans = system.run_folder / "plans.jsonl"
    lines = plans.read_text().splitlines() if plans.exists() else []
    return Outcome(steps, tuple(json.loads(line) for line in lines))
