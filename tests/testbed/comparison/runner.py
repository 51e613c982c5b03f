"""One method with one seed: real training through the whole system, in emulated time.

Coordinator and agents are the real ones, over the memory broker in one process, so that losses
and updates are those of a run. Seconds are not measured here but reckoned by the planner's own
cost model from one machine's measurements, the devices' speeds and their links: a round takes its
steps, and then the slowest device's exchange of adapters. Bytes are those of activations,
gradients and adapters; evaluation, the base's download and headers (under 1 %) are left out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from coordinator import demo, sharding
from coordinator.aggregation import Aggregated, Contribution
from coordinator.exchange import Exchange
from coordinator.handback import HandBack
from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.device_plan import DevicePlan
from coordinator.planning.prediction import predict
from coordinator.registry import Member
from shared.adapters import HeldAdapters, LoraPair
from shared.architecture import ModelArchitecture
from shared.protocol.messages import Activations
from shared.protocol.profile import DataShape
from tests.support.planned import Profiled
from tests.support.simulation import Simulation
from tests.testbed.comparison.fleet import (
    FLEET,
    SERVER_SPEED,
    EmulatedDevice,
    EmulatedMachine,
    Machine,
    slowed,
)
from tests.testbed.comparison.methods import METHODS, Method, lora_settings
from tests.testbed.comparison.results import MethodRun, Point, RoundPoint

MAX_LENGTH = 128
SHAPE = DataShape(mean_length=76.0, padded_length=90.0, longest=MAX_LENGTH)
"""Of E2E in the small base's tokens: what memory budgets are reckoned with."""
FLOAT32 = 4
SERVER = EmulatedDevice(
    name="server", speed=SERVER_SPEED, mbit_per_s=1e6, latency_ms=0, rank=0, blocks=0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training. ``alpha``: of the Dirichlet draw that gives each device its kinds of food;
    None: equal mixtures. ``batch``: sequences of a device in a step, on average.
    """

    method: str
    seed: int
    rounds: int
    steps: int
    batch: int
    learning_rate: float
    alpha: float | None
    held_out: int


@dataclass(slots=True)
class _Tally:
    """What the rounds so far have cost. ``memory``: by device, the most of any round."""

    seconds: float = 0.0
    bytes: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    at_round: list[tuple[float, int]] = field(default_factory=list)
    plans: dict[str, DevicePlan] = field(default_factory=dict)


def run(job: Job, machine: Machine, folder: Path) -> MethodRun:
    """Carry out one training in ``folder``, which is to be empty."""
    torch.set_num_threads(1)
    method = METHODS[job.method]
    base = folder / "base"
    base.symlink_to(demo.base_folder().resolve())
    architecture = ModelArchitecture.from_config(json.loads((base / "config.json").read_text()))
    server = slowed(machine.server, SERVER_SPEED)
    sim = Simulation(
        folder,
        settings=_settings(job, method),
        measure_server=lambda micro_batch, length: server,
        keeps_traffic=False,
    )
    fleet = (SERVER,) if method.pooled else FLEET
    for device, text in zip(fleet, texts(job, folder, count=len(fleet)), strict=True):
        added = sim.add_device(device.name, text=text)
        emulated = EmulatedMachine(device=device, machine=machine, settings=sim.config, shape=SHAPE)
        added.parts = added.agent._parts = replace(added.parts, profiler=Profiled(emulated))
    tally = _Tally()
    with watched(sim, tally, fleet=fleet, machine=machine, architecture=architecture):
        sim.run(limit_s=1e9)
    return _result(job, method, sim, tally)


def _settings(job: Job, method: Method) -> dict[str, Any]:
    lora, own = lora_settings(method)
    plan = {
        "batch": job.batch * (len(FLEET) if method.pooled else 1),
        "devices": own,
        "probe_sequences": 8,
        **method.settings.get("plan", {}),
    }
    count = 1 if method.pooled else len(FLEET)
    return {
        "strategy": method.strategy,
        "rounds": {"count": job.rounds, "steps": job.steps},
        "plan": plan,
        "devices": {"min": count, "expected": count, "wait_s": 1e6},
        "lora": lora,
        "optimizer": {
            "learning_rate": job.learning_rate,
            "warmup_steps": min(5, job.rounds * job.steps // 4),
            "schedule": "cosine",
            "min_learning_rate_ratio": 0.1,
        },
        "training": {"max_length": MAX_LENGTH, "evaluate_batch": 24, "seed": job.seed},
        "aggregation": method.settings.get("aggregation", {}),
    }


def texts(job: Job, folder: Path, *, count: int) -> list[tuple[Path, Path]]:
    """Write each device's training and held-out text; return their paths.

    The same seed gives the same parts, whatever the method.
    """
    shards = demo.shards()
    training = [line for shard in shards for line in shard.training.read_text().splitlines()]
    held_out = [line for shard in shards for line in shard.held_out.read_text().splitlines()]
    parts = _split(training, [_food(line) for line in training], job, count)
    tests = _split(held_out[: job.held_out], [""] * min(job.held_out, len(held_out)), job, count)
    paths = []
    for number, (own, test) in enumerate(zip(parts, tests, strict=True)):
        pair = (folder / f"{number}-training.jsonl", folder / f"{number}-held-out.jsonl")
        for path, lines in zip(pair, (own, test), strict=True):
            path.write_text("\n".join(lines))
        paths.append(pair)
    return paths


def _split(lines: Sequence[str], classes: Sequence[str], job: Job, count: int) -> list[list[str]]:
    names = tuple(sorted(set(classes)))
    index_N = np.array([names.index(one) for one in classes], dtype=np.int64)
    skewed = job.alpha is not None and len(names) > 1
    rule = sharding.Rule(
        devices=tuple(f"d{i}" for i in range(count)),
        by="label" if skewed else "iid",
        alpha=job.alpha if skewed else None,
        seed=job.seed,
        min_records=2 * job.batch if skewed else 1,
    )
    found = sharding.split(sharding.Classes(names, index_N), rule)
    return [[lines[i] for i in own_N] for own_N in found]


def _food(line: str) -> str:
    parts = json.loads(line)["prompt"].removesuffix(" ->").split(" | ")
    return next((part for part in parts if part.startswith("food")), "")


@contextlib.contextmanager
def watched(
    sim: Simulation,
    tally: _Tally,
    *,
    fleet: Sequence[EmulatedDevice],
    machine: Machine,
    architecture: ModelArchitecture,
) -> Iterator[None]:
    """Tally what the rounds of ``sim`` cost inside the block."""
    watch = _Watch(sim, tally, fleet, machine, architecture)
    submit = Exchange.submit

    def submitted(self: Exchange, member: Member, job: Any) -> None:
        submit(self, member, job)
        watch.exchanged(job)

    start, finish = sim.model.start_round, sim.model.finish_round

    def started(number: int, members: Sequence[Member], **rest: Any) -> HandBack:
        handed = start(number, members, **rest)
        watch.started(number, members, handed)
        return handed

    def finished(contributions: Sequence[Contribution]) -> Aggregated:
        watch.finished(contributions)
        return finish(contributions)

    with (
        mock.patch.object(Exchange, "submit", submitted),
        mock.patch.object(sim.model, "start_round", started),
        mock.patch.object(sim.model, "finish_round", finished),
    ):
        yield


@dataclass(slots=True)
class _Watch:
    sim: Simulation
    tally: _Tally
    fleet: Sequence[EmulatedDevice]
    machine: Machine
    architecture: ModelArchitecture
    step_s: float = 0.0

    def exchanged(self, job: Any) -> None:
        """Count a micro-batch: activations and gradients, on their way there and back."""
        if isinstance(job, Activations) and job.purpose != "evaluate":
            self.tally.bytes += 4 * len(job.hidden.data)

    def started(self, number: int, members: Sequence[Member], handed: HandBack) -> None:
        """Count what devices are handed, and reckon what a step of the round will take."""
        sizes = {m.device_id: held_bytes(handed.adapters_of(m.device_id)) for m in members}
        self._exchange(sizes)
        self.tally.at_round.append((self.tally.seconds, self.tally.bytes))
        if number <= self.sim.config.rounds.count:
            self._predict(members)

    def finished(self, contributions: Sequence[Contribution]) -> None:
        """Count the steps of the round, and what devices delivered."""
        self.tally.seconds += self.sim.config.rounds.steps * self.step_s
        self._exchange(
            {c.device: sum(map(pair_bytes, (c.adapters or {}).values())) for c in contributions}
        )

    def _exchange(self, sizes: Mapping[str, int]) -> None:
        links = {device.name: device.link for device in self.fleet}
        if SERVER.name in links:
            return  # nothing leaves the server
        self.tally.bytes += sum(sizes.values())
        self.tally.seconds += max(
            size / links[name].uplink_bytes_per_s + links[name].round_trip_s / 2
            for name, size in sizes.items()
        )

    def _predict(self, members: Sequence[Member]) -> None:
        config = self.sim.config
        speeds = {device.name: device for device in self.fleet}
        devices = [
            FleetDevice(
                device_id=member.device_id,
                terms=config.device_terms(member.device_id),
                measurements=replace(
                    slowed(self.machine.agent, speeds[member.device_id].speed),
                    link=speeds[member.device_id].link,
                ),
                data=member.data,
            )
            for member in members
        ]
        plans = {m.device_id: m.plan for m in members if m.plan is not None}
        server = slowed(self.machine.server, SERVER_SPEED)
        found = predict(plans, devices, Conditions.of(config, self.architecture, server=server))
        self.step_s = found.step_s
        for device, own in found.devices.items():
            before = self.tally.memory.get(device, 0.0)
            self.tally.memory[device] = max(before, own.memory_bytes)
        self.tally.plans = {str(device): plan for device, plan in plans.items()}


def held_bytes(adapters: HeldAdapters) -> int:
    """Return the bytes of what a hand-back sends, in float32."""
    return sum(
        pair_bytes(pair)
        for one in adapters.values()
        for pair in (one.trainable, one.frozen)
        if pair is not None
    )


def pair_bytes(pair: LoraPair) -> int:
    """Return the bytes of a pair in float32."""
    return FLOAT32 * (pair.a_RI.size + pair.b_OR.size)


def _result(job: Job, method: Method, sim: Simulation, tally: _Tally) -> MethodRun:
    lines = sim.metrics()
    evaluated = [line for line in lines if "eval/perplexity" in line]
    closed = [line for line in lines if "aggregation/error" in line]
    points = tuple(
        Point(
            step=int(line["step"]),
            seconds=seconds,
            bytes=size,
            perplexity=line["eval/perplexity"],
            loss=line["eval/loss"],
        )
        for line, (seconds, size) in zip(evaluated, tally.at_round, strict=True)
    )
    return MethodRun(
        method=method.name,
        seed=job.seed,
        kind=method.kind,
        split_layers={name: plan.split_layer for name, plan in tally.plans.items()},
        ranks={name: max(plan.ranks.values(), default=0) for name, plan in tally.plans.items()},
        points=points,
        rounds=tuple(
            RoundPoint(
                round=int(line["round"]),
                aggregation_error=line["aggregation/error"],
                training_loss=line["round/train_loss"],
            )
            for line in closed
        ),
        peak_memory_bytes=tally.memory,
        peak_memory="predicted",
        note=method.note,
    )
