"""Seconds of a step: a planned fleet against the best uniform plan, same tokens a step.

Four emulated devices (speeds 1, 0.5, 0.25, 0.25; links 200, 50, 20, 10 Mbit/s; two short of
memory), real programs over a loopback mosquitto. All speeds are scaled down by one factor, so that
the devices together need less than one core and the server has one to itself at full speed: it is
1 / scale times as fast as the fastest device. Uniform: one split layer, a quarter of the batch
and one micro-batch for all; each that every device's memory holds is measured, the best counts.

    python -m tests.testbed.bench_fleet --sequences 16 --scale 0.1
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.testbed.emulated_fleet import (
    LENGTH,
    MIB,
    Device,
    Outcome,
    RunFailedError,
    base_and_text,
    emulation,
    finish,
    memory_limits,
    run_settings,
    start_fleet,
)
from tests.testbed.system import ROOT, System, broker

FLEET = (
    Device(name="workstation", speed=1.0, mbit_per_s=200),
    Device(name="laptop", speed=0.5, mbit_per_s=50),
    Device(name="orin", speed=0.25, mbit_per_s=20, most_blocks=3),
    Device(name="nano", speed=0.25, mbit_per_s=10, most_blocks=2),
)
IN_FLIGHT = 2
AIM = 0.6


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs have in common."""

    folder: Path
    url: str
    base: Path
    text: Path
    emulations: Mapping[str, str]
    options: argparse.Namespace

    def run(self, name: str, plan: Mapping[str, Any], *, rounds: int, steps: int) -> Outcome:
        """Carry out one run; return what it did."""
        settings = run_settings(
            self.base, devices=len(FLEET), plan=plan, rounds=rounds, steps=steps
        )
        with System(self.folder / name, self.url) as system:
            return finish(system, *start_fleet(system, self.text, self.emulations, settings))


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


def planned_plan(batch: int) -> dict[str, Any]:
    """Return the plan settings that leave everything to the planner but the mean batch."""
    return {"batch": batch, "probe_sequences": 0, "ranks": "uniform"}


def measure_uniform(bench: Bench, split_layer: int, micro_batch: int, *, steps: int) -> Uniform:
    """Return the median step of one uniform plan, in its second round."""
    plan = uniform_plan(split_layer, bench.options.sequences // len(FLEET), micro_batch)
    step_s = None
    try:
        name = f"uniform-{split_layer}-{micro_batch}"
        step_s = bench.run(name, plan, rounds=2, steps=steps).median_s(first_round=2)
    except RunFailedError as error:
        print(f"  does not run: {str(error).splitlines()[-1][:150]}")
    found = Uniform(split_layer=split_layer, micro_batch=micro_batch, step_s=step_s)
    print(f"  {found}", flush=True)
    return found


def best_uniform(bench: Bench) -> tuple[Uniform, list[Uniform]]:
    """Try every split layer that all memories hold, then other micro-batches with the best.

    Returns the best one, and all.
    """
    batch = bench.options.sequences // len(FLEET)
    most = min(one.most_blocks for one in FLEET if one.most_blocks is not None)
    usual = max(1, batch // IN_FLIGHT)
    tried = [measure_uniform(bench, k, usual, steps=bench.options.steps) for k in _upto(most)]
    best = _best(tried)
    tried += [
        measure_uniform(bench, best.split_layer, micro_batch, steps=bench.options.steps)
        for micro_batch in sorted({1, batch} - {usual})
    ]
    return _best(tried), tried


def _upto(most: int) -> range:
    return range(1, most + 1)


def _best(tried: Sequence[Uniform]) -> Uniform:
    ran = [one for one in tried if one.step_s is not None]
    if not ran:
        raise SystemExit("no uniform plan fits every device")
    return min(ran, key=lambda one: one.step_s or 0.0)


def main() -> None:
    """Measure, print a table, write build/bench/fleet.json."""
    options = _options()
    with tempfile.TemporaryDirectory() as temporary, broker(Path(temporary)) as url:
        folder = Path(temporary)
        base, text = base_and_text(folder)
        micro_batch = max(1, options.sequences // len(FLEET) // IN_FLIGHT)
        limits = memory_limits(folder, base, FLEET, micro_batch=micro_batch, in_flight=IN_FLIGHT)
        emulations = {
            one.name: emulation(one, scale=options.scale, memory_bytes=limits[one.name])
            for one in FLEET
        }
        for name, emulate in emulations.items():
            print(f"{name:<12} {emulate}", flush=True)
        bench = Bench(
            folder=folder,
            url=url,
            base=base,
            text=text,
            emulations=emulations,
            options=options,
        )
        best, tried = best_uniform(bench)
        planned = bench.run(
            "planned",
            planned_plan(options.sequences // len(FLEET)),
            rounds=options.rounds,
            steps=options.steps,
        )
    _report(planned, best, tried, limits, options)


def _report(
    planned: Outcome,
    best: Uniform,
    tried: Sequence[Uniform],
    limits: Mapping[str, int | None],
    options: argparse.Namespace,
) -> None:
    assert best.step_s is not None
    step_s = planned.median_s(first_round=options.rounds)
    ratio = step_s / best.step_s
    print(
        f"{options.sequences} sequences of {LENGTH} tokens a step; speeds x {options.scale:g}, "
        f"server at full speed on one thread; median step of the last of {options.rounds} rounds "
        f"of {options.steps} (planned) and of the second of two (uniform)"
    )
    plan = planned.plans[-1]
    print(f"{'device':<12}{'k':>3}{'batch':>7}{'micro':>7}{'memory':>10}  why")
    for name, part in plan["devices"].items():
        limit = limits[name]
        memory = "-" if limit is None else f"{limit / MIB:.0f} MiB"
        print(
            f"{name:<12}{part['split_layer']:>3}{part['batch']:>7}{part['micro_batch']:>7}"
            f"{memory:>10}  {part['reason']}"
        )
    predicted = plan["predicted_step_s"]
    said = "" if predicted is None else f" (predicted {predicted:.2f} s)"
    print(
        f"planned {step_s:.2f} s{said}, best uniform {best.step_s:.2f} s (k = {best.split_layer}, "
        f"micro-batch {best.micro_batch}): ratio {ratio:.2f}, aim at most {AIM}"
    )
    found = {
        "options": vars(options),
        "ratio": ratio,
        "aim": AIM,
        "planned_step_s": step_s,
        "predicted_step_s": predicted,
        "plans": planned.plans,
        "uniform": [vars(one) for one in tried],
        "best_uniform": vars(best),
        "memory_bytes": dict(limits),
    }
    write_report("fleet", found)


def write_report(name: str, found: Mapping[str, Any]) -> None:
    """Write build/bench/<name>.json."""
    target = ROOT / "build" / "bench" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {target.relative_to(ROOT)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.1, help="of all speeds")
    parser.add_argument("--sequences", type=int, default=16, help="of all devices in one step")
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of the planned run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
