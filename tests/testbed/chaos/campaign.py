"""Real programs, a real broker and everything that can go wrong: seeded schedules of faults.

make chaos                                              200 schedules
python -m tests.testbed.chaos.campaign --seed 17        one of them again, its folder kept
python -m tests.testbed.chaos.campaign --schedules 20   some

Each run must end, and end where a run comes that nobody disturbs and that has the same accepted
contributions (`replay`); nothing may count twice, and no round that was acknowledged be lost. The
order of the faults and how long they last follow from the seed; when exactly they strike depends
on the machine, too, so a schedule that failed may need some attempts to fail again.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.testbed.bench_report import write_report
from tests.testbed.chaos import clocks, trial, verdict
from tests.testbed.chaos.bed import Material
from tests.testbed.chaos.disk import why_no_disk
from tests.testbed.chaos.faults import KINDS
from tests.testbed.chaos.programs import Starter
from tests.testbed.chaos.schedule import drawn
from tests.testbed.chaos.verdict import Verdict

ENOUGH = 200
HEAD = f"{'seed':>5}{'s':>7}{'dropped':>9}{'repeated':>10}{'difference':>12}  faults"
_DIE_WITH_PARENT = 1


@dataclass(frozen=True)
class Result:
    """One schedule, and how its run fared. ``struck``: the faults that came to pass."""

    seed: int
    schedule: str
    optimizer: str
    labels: str
    struck: tuple[str, ...]
    seconds: float
    verdict: Verdict

    @property
    def line(self) -> str:
        found = self.verdict
        apart = "-" if found.difference is None else f"{found.difference:.1e}"
        wrong = "".join(f"\n      WRONG: {words}" for words in found.wrong)
        return (
            f"{self.seed:>5}{self.seconds:>7.1f}{found.dropped:>9}{found.repeated:>10}{apart:>12}"
            f"  {self.schedule}{wrong}"
        )


def one(seed: int, *, keep: Path | None, without: Collection[str]) -> Result:
    """Carry out one schedule in this process; ``keep``: where the folder of a failure goes."""
    schedule = drawn(seed, without=without)
    with tempfile.TemporaryDirectory(
        prefix=f"chaos-{seed}-", ignore_cleanup_errors=True
    ) as temporary:
        folder = Path(temporary)
        material = Material.written(folder / "material")
        run_folder = folder / "run"
        run_folder.mkdir()
        done = trial.run(schedule, material, run_folder, Starter())
        found = verdict.judge(done, material.folder)
        if found.wrong and keep is not None:
            shutil.copytree(folder, keep / f"seed-{seed}", dirs_exist_ok=True)
    return Result(
        seed,
        str(schedule),
        schedule.optimizer,
        schedule.labels,
        tuple(done.struck),
        done.seconds,
        found,
    )


def campaign(
    seeds: Sequence[int], *, processes: int, keep: Path | None, without: Collection[str]
) -> Iterator[Result]:
    """Yield each schedule's result, in order; ``processes`` at once."""
    work = partial(_in_worker, keep=keep, without=without)
    with ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare
    ) as pool:
        yield from pool.map(work, seeds)


def _in_worker(seed: int, **choices: Any) -> Result:
    try:
        return one(seed, **choices)
    except SystemExit:
        os._exit(1)  # all is cleaned up, and the pool would give it another one


def _prepare() -> None:
    """Let a worker end with its campaign, and clean up when it does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(1))
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    torch.set_num_threads(1)


def by_kind(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return for each kind of fault how often it struck, and how those runs fared."""
    of_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        for kind in set(result.struck):
            of_kind[kind].append(result)
    return {
        kind: {
            "runs": len(of_kind[kind]),
            "strikes": sum(result.struck.count(kind) for result in of_kind[kind]),
            "wrong": sum(bool(result.verdict.wrong) for result in of_kind[kind]),
            "with a device dropped": sum(bool(r.verdict.dropped) for r in of_kind[kind]),
            "with a round repeated": sum(bool(r.verdict.repeated) for r in of_kind[kind]),
        }
        for kind in KINDS
        if kind in of_kind
    }


def _table(kinds: dict[str, dict[str, Any]]) -> str:
    columns = ("runs", "strikes", "wrong", "with a device dropped", "with a round repeated")
    lines = [f"{'fault':24}" + "".join(f"{name:>{len(name) + 2}}" for name in columns)]
    for kind, row in kinds.items():
        lines.append(f"{kind:24}" + "".join(f"{row[name]:>{len(name) + 2}}" for name in columns))
    return "\n".join(lines)


def _without(folder: Path) -> dict[str, str]:
    """Return the kinds of faults that this machine does not let us make, and why."""
    reasons = {
        "disk full": why_no_disk(folder),
        "clock jumped": None if clocks.preloaded() else "there is no C compiler (cc)",
    }
    return {kind: reason for kind, reason in reasons.items() if reason is not None}


def _shown(results: Iterator[Result]) -> list[Result]:
    print(HEAD)
    shown = []
    for result in results:
        print(result.line, flush=True)
        shown.append(result)
    return shown


def main() -> int:
    """Run what is asked for; write the figures; fail where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=ENOUGH)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--processes", type=int, default=4, help="runs at once; most of it waits")
    parser.add_argument("--keep", type=Path, help="keeps the folders of runs that go wrong")
    options = parser.parse_args()
    alone = options.seed is not None
    seeds = [options.seed] if alone else range(options.first, options.first + options.schedules)
    keep = options.keep or (Path(tempfile.mkdtemp(prefix="chaos-kept-")) if alone else None)
    with tempfile.TemporaryDirectory() as folder:
        without = _without(Path(folder))
    for kind, reason in without.items():
        print(f"NOTE: no fault '{kind}': {reason}")
    began_s = time.monotonic()
    results = _shown(
        campaign(seeds, processes=options.processes, keep=keep, without=frozenset(without))
    )
    return _concluded(results, seconds=time.monotonic() - began_s, without=without)


def _concluded(results: Sequence[Result], *, seconds: float, without: dict[str, str]) -> int:
    kinds = by_kind(results)
    print(f"\n{_table(kinds)}\n")
    wrong = [result.seed for result in results if result.verdict.wrong]
    largest = {
        name: max((r.verdict.difference or 0.0 for r in results if r.optimizer == name), default=0)
        for name in ("sgd", "adamw")
    }
    write_report(
        "chaos",
        {
            "schedules": len(results),
            "wrong": wrong,
            "largest_difference": largest,
            "seconds": seconds,
            "not_made": without,
            "by_kind": kinds,
            "runs": [_entry(result) for result in results],
        },
    )
    print(
        f"{len(results)} schedules in {seconds:.0f} s, {len(wrong)} of them wrong {wrong or ''}; "
        f"largest difference {largest['sgd']:.1e} (SGD), {largest['adamw']:.1e} (AdamW)"
    )
    return 1 if wrong else 0


def _entry(result: Result) -> dict[str, Any]:
    return {**vars(result), "verdict": vars(result.verdict)}


if __name__ == "__main__":
    sys.exit(main())
