"""Seconds of a step: a planned fleet against the best uniform plan, same tokens a step.

Four emulated devices (speeds 1, 0.5, 0.25, 0.25; links 200, 50, 20, 10 Mbit/s; two short of
memory), real programs over a loopback mosquitto. All speeds are scaled down by one factor, so that
the devices together need a fraction of a core and the server has one to itself at full speed: it
is 1 / scale times as fast as the fastest device. Uniform: one split layer, one micro-batch and a
quarter of the batch for all. For each micro-batch ever deeper splits are measured, until a
device's memory is full or the step becomes longer; the best of all counts.

    python -m tests.testbed.bench_fleet --sequences 16 --scale 0.05
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.testbed import large_base
from tests.testbed.bench_report import write_report
from tests.testbed.emulated_fleet import (
    IN_FLIGHT,
    LENGTH,
    MIB,
    Bench,
    Device,
    MemoryModel,
    Outcome,
    RunFailedError,
    base_and_text,
    emulation,
    finish,
    planned_plan,
    run_settings,
    start_fleet,
)
from tests.testbed.system import System, broker

FLEET = (
    Device(name="workstation", speed=1.0, mbit_per_s=200),
    Device(name="laptop", speed=0.5, mbit_per_s=50, most_sequences=1),
    Device(name="orin", speed=0.25, mbit_per_s=20, most_sequences=1),
    Device(name="nano", speed=0.25, mbit_per_s=10),
)
HOPELESS = 1.1
"""A uniform plan that should need so much more than the smallest memory is not tried."""
AIM = 0.6


@dataclass(frozen=True, kw_only=True)
class FleetBench(Bench):
    """What all runs have in common."""

    memory: MemoryModel

    def run(
        self, name: str, plan: Mapping[str, Any], *, rounds: int, must_fit: bool = False
    ) -> Outcome:
        """Carry out one run; return what it did."""
        settings = run_settings(
            self.base, devices=len(FLEET), plan=plan, rounds=rounds, steps=self.options.steps
        )
        emulations = {
            one.name: emulation(
                one, scale=self.options.scale, memory_bytes=self.memory.limit_bytes(one)
            )
            for one in FLEET
        }
        with System(self.folder / name, self.url) as system:
            coordinator, agents = start_fleet(system, self.text, emulations, settings)
            return finish(system, coordinator, agents, must_fit=must_fit)

    @property
    def batch(self) -> int:
        """Sequences of each device in a step, where all are equal."""
        return int(self.options.sequences) // len(FLEET)

    @property
    def least_memory_bytes(self) -> float:
        """What the device with the least memory has."""
        limits = [self.memory.limit_bytes(one) for one in FLEET]
        return min((limit for limit in limits if limit is not None), default=math.inf)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """One plan for all devices and its median step; None: a device had no room for it."""

    split_layer: int
    micro_batch: int
    step_s: float | None


def uniform_plan(split_layer: int, batch: int, micro_batch: int) -> dict[str, Any]:
    """Return the plan settings of a fleet of equals."""
    return {
        "split_layer": split_layer,
        "batch": batch,
        "micro_batch": micro_batch,
        "in_flight": IN_FLIGHT,
        "balance_batches": False,
        "adapt": False,
        "probe_sequences": 0,
        "ranks": "uniform",
    }


def measure_uniform(bench: FleetBench, split_layer: int, micro_batch: int) -> Uniform:
    """Return the median step of one uniform plan, in its second round."""
    needed = bench.memory.needed_bytes(split_layer=split_layer, micro_batch=micro_batch)
    step_s = None
    if needed < HOPELESS * bench.least_memory_bytes:
        plan = uniform_plan(split_layer, bench.batch, micro_batch)
        name = f"uniform-{split_layer}-{micro_batch}"
        with contextlib.suppress(RunFailedError):
            step_s = bench.run(name, plan, rounds=2, must_fit=True).median_s(first_round=2)
    found = Uniform(split_layer=split_layer, micro_batch=micro_batch, step_s=step_s)
    said = "does not fit" if step_s is None else f"{step_s:.2f} s"
    print(f"uniform k = {split_layer}, micro-batch {micro_batch}: {said}", flush=True)
    return found


def measured_uniforms(bench: FleetBench) -> list[Uniform]:
    """Measure for each micro-batch ever deeper splits, while that pays."""
    tried: list[Uniform] = []
    micro_batch = 1
    while micro_batch <= bench.batch:
        last = math.inf
        for split_layer in range(1, large_base.BLOCKS):
            found = measure_uniform(bench, split_layer, micro_batch)
            tried.append(found)
            if found.step_s is None or found.step_s > last:
                break
            last = found.step_s
        micro_batch *= 2
    return tried


def main() -> None:
    """Measure, print a table, write build/bench/fleet.json."""
    options = _options()
    with tempfile.TemporaryDirectory() as temporary, broker(Path(temporary)) as url:
        folder = Path(temporary)
        base, text = base_and_text(folder)
        plan = planned_plan(options.sequences // len(FLEET))
        settings = run_settings(
            base, devices=len(FLEET), plan=plan, rounds=options.rounds, steps=options.steps
        )
        memory = MemoryModel.of(folder, base, settings)
        bench = FleetBench(
            folder=folder, url=url, base=base, text=text, memory=memory, options=options
        )
        uniforms = measured_uniforms(bench)
        planned = bench.run("planned", planned_plan(bench.batch), rounds=options.rounds)
    _report(bench, planned, uniforms)


def _report(bench: FleetBench, planned: Outcome, uniforms: Sequence[Uniform]) -> None:
    options = bench.options
    best_s, best = min((one.step_s or math.inf, i) for i, one in enumerate(uniforms))
    step_s = planned.median_s(first_round=options.rounds)
    plan = planned.plans[-1]
    print(
        f"{options.sequences} sequences of {LENGTH} tokens a step; speeds x {options.scale:g}, "
        f"server at full speed on one thread; median step of the last of {options.rounds} rounds "
        f"of {options.steps} (planned) and of the second of two (uniform)"
    )
    _print_parts(bench, plan["devices"])
    predicted = plan["predicted_step_s"]
    said = "" if predicted is None else f" (predicted {predicted:.2f} s)"
    print(
        f"planned {step_s:.2f} s{said}, best uniform {best_s:.2f} s "
        f"(k = {uniforms[best].split_layer}, micro-batch {uniforms[best].micro_batch}): "
        f"ratio {step_s / best_s:.2f}, aim at most {AIM}"
    )
    found = {
        "options": vars(options),
        "ratio": step_s / best_s,
        "aim": AIM,
        "planned_step_s": step_s,
        "predicted_step_s": predicted,
        "plans": planned.plans,
        "uniform": [asdict(one) for one in uniforms],
        "best_uniform": asdict(uniforms[best]),
        "fleet": [asdict(one) | {"memory_bytes": bench.memory.limit_bytes(one)} for one in FLEET],
    }
    write_report("fleet", found)


def _print_parts(bench: FleetBench, parts: Mapping[str, Mapping[str, Any]]) -> None:
    columns = f"{'speed':>7}{'Mbit/s':>8}{'MiB':>6}{'k':>4}{'batch':>7}{'micro':>7}{'flight':>8}"
    print(f"{'device':<12}{columns}  why")
    for one in FLEET:
        limit, part = bench.memory.limit_bytes(one), parts[one.name]
        memory = "-" if limit is None else f"{limit / MIB:.0f}"
        print(
            f"{one.name:<12}{one.speed * bench.options.scale:>7.3g}{one.mbit_per_s:>8g}{memory:>6}"
            f"{part['split_layer']:>4}{part['batch']:>7}{part['micro_batch']:>7}"
            f"{part['in_flight']:>8}  {part['reason']}"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.05, help="of all speeds")
    parser.add_argument("--sequences", type=int, default=16, help="of all devices in one step")
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of the planned run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
