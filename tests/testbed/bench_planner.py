"""The planner against brute force on small fleets, and its time for ten thousand devices.

Fleets are random (speeds, links and memory over more than a factor of ten), the measurements are
made up by `tests.support.fleets`; the plan's predicted step is compared with the best of *all*
plans under the same prediction. Prints a table, writes build/bench/planner.json.

    make bench-planner        BENCH_ARGS="--fleets 20 --devices 1000"
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.cost_book import fitted
from coordinator.planning.planner import plan_fleet
from shared.architecture import ModelArchitecture
from shared.terms import LabelMode, TrainingTerms
from tests.support import brute_force
from tests.support.fleets import Machine, conditions, device, llama
from tests.testbed.bench_report import write_report

AIM_RATIO = 1.01
AIM_SECONDS = 5.0
SMALL = ((2, 3, 4), (2, 5, 3), (3, 3, 2))
"""(devices, blocks of the model, mean batch): as much as can be tried in full."""
BLOCKS = 32
BATCH = 8
LABELS: tuple[LabelMode, ...] = ("device", "server")


@dataclass(frozen=True)
class Small:
    """One small fleet: the plan's step over the best of all plans."""

    devices: int
    blocks: int
    labels: str
    ratio: float


@dataclass(frozen=True)
class Large:
    """One large fleet. ``fit_s``: costs from measurements, once for each device that joins."""

    devices: int
    labels: str
    fit_s: float
    plan_s: float
    again_s: float


def random_fleet(
    random: np.random.Generator, architecture: ModelArchitecture, *, count: int, batch: int
) -> list[FleetDevice]:
    """Return devices of very different kinds; half of them with a memory limit."""
    least, most = 330 * 2**20, (300 + 60 * architecture.block_count) * 2**20

    def machine() -> Machine:
        return Machine(
            speed=10 ** random.uniform(-1.5, 0),
            uplink=10 ** random.uniform(5.5, 7.5),
            downlink=10 ** random.uniform(5.5, 7.5),
            memory_bytes=int(random.uniform(least, most)) if random.random() < 0.5 else None,
        )

    micro_batch = -(-batch // 2)
    return [
        device(f"d{index}", machine(), architecture, batch=batch, micro_batch=micro_batch)
        for index in range(count)
    ]


def run(
    architecture: ModelArchitecture, labels: LabelMode, *, speed: float, open_: int
) -> Conditions:
    """Return a run whose server has this speed, and so many micro-batches open at once."""
    training = TrainingTerms(max_length=128, labels=labels)
    return conditions(
        architecture, server=Machine(speed=speed), training=training, open_micro_batches=open_
    )


def small(random: np.random.Generator, options: argparse.Namespace) -> list[Small]:
    """Return how near the plan is to the best of all plans, over random fleets."""
    found = []
    for index in range(options.fleets):
        count, blocks, batch = SMALL[index % len(SMALL)]
        labels = LABELS[index // len(SMALL) % 2]
        architecture = llama(blocks)
        devices = random_fleet(random, architecture, count=count, batch=batch)
        speed = 10 ** random.uniform(-1.3, 1)
        conditions_ = run(architecture, labels, speed=speed, open_=options.open)
        plan = plan_fleet(devices, conditions_)
        there = [one for one in devices if one.device_id in plan.plans]
        ratio = plan.predicted_step_s / brute_force.best_step_s(there, conditions_)
        found.append(Small(len(there), blocks, labels, ratio))
    return found


def large(random: np.random.Generator, options: argparse.Namespace) -> list[Large]:
    """Return how long a plan for a large fleet takes, in both label modes."""
    found = []
    for labels in LABELS:
        architecture = llama(BLOCKS)
        devices = random_fleet(random, architecture, count=options.devices, batch=BATCH)
        conditions_ = run(architecture, labels, speed=50.0, open_=options.open)
        times = [time.perf_counter()]
        for one in devices:
            assert one.measurements is not None
            fitted(one.measurements)
        for _ in range(2):
            times.append(time.perf_counter())
            plan_fleet(devices, conditions_)
        times.append(time.perf_counter())
        fit_s, plan_s, again_s = np.diff(times).tolist()
        found.append(Large(len(devices), labels, fit_s, plan_s, again_s))
    return found


def main() -> None:
    """Compare and measure, print two tables, write build/bench/planner.json."""
    options = _options()
    random = np.random.default_rng(options.seed)
    began_s = time.perf_counter()
    rows = small(random, options)
    searched_s = time.perf_counter() - began_s
    _print_small(rows, searched_s)
    fleets = large(random, options)
    _print_large(fleets)
    found = {"options": vars(options), "small": _data(rows), "large": _data(fleets)}
    write_report("planner", found)


def _print_small(rows: list[Small], seconds: float) -> None:
    ratios = [row.ratio for row in rows]
    print(f"{'fleets':<10}{'median':>10}{'worst':>10}{'within 1 %':>12}{'aim':>8}")
    print(
        f"{len(rows):<10}{statistics.median(ratios):>10.4f}{max(ratios):>10.4f}"
        f"{sum(ratio <= AIM_RATIO for ratio in ratios) / len(ratios):>12.1%}{AIM_RATIO:>8}"
    )
    print(f"predicted step of the plan over the best of all plans; {seconds:.0f} s of trying")


def _print_large(rows: list[Large]) -> None:
    print(f"{'devices':<10}{'labels':<10}{'plan s':>10}{'again s':>10}{'fit s':>10}{'aim':>8}")
    for row in rows:
        print(
            f"{row.devices:<10}{row.labels:<10}{row.plan_s:>10.2f}{row.again_s:>10.2f}"
            f"{row.fit_s:>10.2f}{AIM_SECONDS:>8}"
        )
    print(f"{BLOCKS} blocks; fit: from measurements to costs, once for each device that joins")


def _data(rows: list[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fleets", type=int, default=60)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--open", type=int, default=16, help="devices.open_micro_batches")
    return parser.parse_args()


if __name__ == "__main__":
    main()
