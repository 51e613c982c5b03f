"""Thousands of steps with real programs: does any of them grow?

Coordinator, three agents and mosquitto; every sample reads what the kernel knows of each process:
its resident memory (RSS), and of that what is its own (PSS: shared pages by their share).

Growth is the median of the slopes between all pairs of samples after the warm-up (Theil and Sen's
line, which a few odd samples cannot turn), times the time between the first and the last of them,
as a share of the median size. Last minus first would be the noise of two samples: an allocator
takes memory from the system and gives it back in lumps.

    make soak                                  BENCH_ARGS="--steps 2000"
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tests.testbed.bench_report import write_report
from tests.testbed.long_run import (
    DEVICES,
    LongRun,
    over_mosquitto,
    settings,
    wait_for,
    write_files,
)

STEPS = 12_000
"""An hour of steps of 0.3 s, which is what small devices take for a small model."""
STEPS_A_ROUND = 20
WARM_UP = 0.2
"""Share of the steps after which sizes count."""
MOST_GROWTH = 0.02
MOST_SAMPLES = 2_000
MIB = 2**20


@dataclass
class Sizes:
    """What was seen of one process: bytes, sample by sample."""

    rss: list[int] = field(default_factory=list)
    pss: list[int] = field(default_factory=list)


@dataclass
class Samples:
    """All processes together. ``step``: how many steps were closed by then."""

    seconds: list[float] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    sizes: dict[str, Sizes] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One process after its warm-up; growths are shares of the median."""

    process: str
    rss_bytes: float
    rss_growth: float
    pss_growth: float
    largest_rss_bytes: int


def growth(seconds: Sequence[float], sizes: Sequence[int]) -> float:
    """Return how much larger a robust line through the samples is at its end, as a share.

        g = median over i < j of (y_j − y_i) / (t_j − t_i) · (t_last − t_first) / median(y)

    Symbols: t the time of a sample, y its size. At least two samples.
    Paper:   P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, 1968.
    """
    every = max(1, len(sizes) // MOST_SAMPLES)
    t, y = np.asarray(seconds[::every]), np.asarray(sizes[::every], dtype=np.float64)
    i, j = np.triu_indices(len(t), k=1)
    slope = np.median((y[j] - y[i]) / (t[j] - t[i]))
    return float(slope * (t[-1] - t[0]) / np.median(y))


def rows(samples: Samples) -> list[Row]:
    """Return the figures of every process, of the samples after the warm-up."""
    last = samples.step[-1]
    first = next(i for i, step in enumerate(samples.step) if step >= WARM_UP * last)
    seconds = samples.seconds[first:]
    return [
        Row(
            process=name,
            rss_bytes=float(np.median(sizes.rss[first:])),
            rss_growth=growth(seconds, sizes.rss[first:]),
            pss_growth=growth(seconds, sizes.pss[first:]),
            largest_rss_bytes=max(sizes.rss[first:]),
        )
        for name, sizes in samples.sizes.items()
    ]


def sizes_of(pid: int) -> tuple[int, int]:
    """Return RSS and PSS of a process, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found["Rss"], found["Pss"]


def watch(run: LongRun, broker_pid: int, *, steps: int, every_s: float) -> Samples:
    """Sample all processes until ``steps`` steps are closed."""
    pids = {"coordinator": run.coordinator.popen.pid, "mosquitto": broker_pid}
    pids |= {name: agent.popen.pid for name, agent in run.agents.items()}
    samples = Samples(sizes={name: Sizes() for name in pids})
    began_s = time.monotonic()
    closed = 0
    while closed < steps:
        time.sleep(every_s)
        closed = run.steps.read()[-1].step
        samples.seconds.append(time.monotonic() - began_s)
        samples.step.append(closed)
        for name, pid in pids.items():
            rss, pss = sizes_of(pid)
            samples.sizes[name].rss.append(rss)
            samples.sizes[name].pss.append(pss)
    return samples


def soak(folder: Path, *, steps: int, every_s: float) -> Samples:
    """Run everything for so many steps; return what was seen."""
    files = write_files(folder)
    with over_mosquitto(folder / "run") as (system, broker):
        # One round more than is watched: the end of a run is no part of it.
        rounds = steps // STEPS_A_ROUND + 1_000
        run = LongRun(system, files, settings(files, rounds=rounds, steps=STEPS_A_ROUND))
        run.start_coordinator()
        for device in DEVICES:
            run.start_agent(device)
        wait_for(lambda: len(run.steps.read()) > 0, "a first step")
        return watch(run, broker.pid, steps=steps, every_s=every_s)


def main() -> int:
    """Soak, print a table, write build/bench/soak.json; fail where something grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(Path(folder), steps=options.steps, every_s=options.every)
    found = rows(samples)
    minutes = samples.seconds[-1] / 60
    print(f"{samples.step[-1]} steps, {minutes:.0f} minutes, {len(samples.seconds)} samples; "
          f"the first {WARM_UP:.0%} of the steps are warm-up")  # fmt: skip
    print(f"{'process':<14}{'RSS MiB':>10}{'largest':>10}{'growth':>10}{'of PSS':>10}{'aim':>8}")
    for row in found:
        print(
            f"{row.process:<14}{row.rss_bytes / MIB:>10.1f}{row.largest_rss_bytes / MIB:>10.1f}"
            f"{row.rss_growth:>10.2%}{row.pss_growth:>10.2%}{MOST_GROWTH:>8.0%}"
        )
    report: Mapping[str, object] = {
        "options": vars(options),
        "rows": [asdict(row) for row in found],
        "samples": asdict(samples),
    }
    write_report("soak", report)
    return int(any(row.rss_growth > MOST_GROWTH for row in found))


if __name__ == "__main__":
    sys.exit(main())
