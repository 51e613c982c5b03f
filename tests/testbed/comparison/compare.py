"""Strategies, ablations and centralised LoRA, side by side: the same base, data, steps and seeds.

make compare                                   few steps, one learning rate
make compare-full                              more steps, rates tuned for each method
python -m tests.testbed.comparison.compare --methods hsplitlora splitlora --seeds 0 --alpha 0.3
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from pydantic import TypeAdapter

from coordinator import demo
from coordinator.model_store import ModelStore
from coordinator.server_measuring import ServerWork, measure_server
from shared import version
from shared.clock import SystemClock
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.testbed.comparison import page, runner
from tests.testbed.comparison.fleet import FLEET, SERVER_SPEED, EmulatedDevice, Machine
from tests.testbed.comparison.methods import EQUAL_RANK, METHODS, TARGETS
from tests.testbed.comparison.results import Comparison, MethodRun
from tests.testbed.comparison.runner import Job
from tests.testbed.emulated_fleet import profiled
from tests.testbed.system import ROOT

TUNING_SEED = 1000
MACHINE: TypeAdapter[Machine] = TypeAdapter(Machine)


def main() -> None:
    """Run what is asked for; write the figures and the page."""
    options = _options()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        machine = machine_of(options.machine, Path(temporary))
        work = partial(_work, machine=machine)
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            rates = _tuned(partial(pool.imap_unordered, work), options)
            jobs = [
                _job(options, name, seed=seed, learning_rate=rates[name])
                for seed in options.seeds
                for name in options.methods
            ]
            found = []
            for _, one in pool.imap_unordered(work, jobs):
                found.append(one)
                print(_line(one), flush=True)
    order = list(METHODS)
    runs = tuple(sorted(found, key=lambda one: (order.index(one.method), one.seed)))
    settings = _settings(options, rates, seconds=time.monotonic() - began_s)
    comparison = Comparison(settings=settings, methods=runs)
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    comparison.save(folder / f"{options.name}.json")
    page.write(comparison, folder / f"{options.name}.html")
    print(f"written: build/bench/{options.name}.json, build/bench/{options.name}.html")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="compare", help="of the files in build/bench")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="in each round")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a device in a step")
    parser.add_argument("--alpha", type=float, help="unequal mixtures of the kinds of food")
    parser.add_argument("--held-out", type=int, default=40, help="lines to evaluate on")
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, default=[5e-3],
        help="with several, each method has the best of them on a seed of its own",
    )  # fmt: skip
    parser.add_argument(
        "--machine", type=Path, metavar="FILE",
        help="what a machine measured of itself; written where it does not exist",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def machine_of(file: Path | None, folder: Path) -> Machine:
    """Return what ``file`` says a machine measured, or measure this one now."""
    if file is not None and file.exists():
        return MACHINE.validate_json(file.read_bytes())
    machine = measured(folder)
    if file is not None:
        file.write_bytes(MACHINE.dump_json(machine))
    return machine


def measured(folder: Path) -> Machine:
    """Return what this machine measures of itself for the base, as an agent and as a server."""
    store = ModelStore.open(str(demo.base_folder()), cache_folder=folder / "store")
    torch.set_num_threads(1)
    server = measure_server(
        ServerWork(
            config=store.config,
            tensors=store.tensors(),
            training=TrainingTerms(max_length=runner.MAX_LENGTH),
            lora=LoraTerms(r=EQUAL_RANK, target_modules=TARGETS),
            optimizer=OptimizerTerms(),
            micro_batch=2,
            length=round(runner.SHAPE.padded_length),
            device="cpu",
        ),
        SystemClock(),
    )
    agent = profiled(folder, demo.base_folder()).measurements
    return Machine(agent=agent, server=server)


def _work(job: Job, *, machine: Machine) -> tuple[Job, MethodRun]:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        return job, runner.run(job, machine, Path(folder))


def _job(options: argparse.Namespace, name: str, *, seed: int, learning_rate: float) -> Job:
    return Job(
        method=name,
        seed=seed,
        rounds=options.rounds,
        steps=options.steps,
        batch=options.batch,
        learning_rate=learning_rate,
        alpha=options.alpha,
        held_out=options.held_out,
    )


def _tuned(
    run_all: Callable[[Sequence[Job]], Iterable[tuple[Job, MethodRun]]], options: argparse.Namespace
) -> dict[str, float]:
    """Return each method's learning rate: the best on a seed that is not compared."""
    rates = options.learning_rates
    if len(rates) == 1:
        return dict.fromkeys(options.methods, rates[0])
    best: dict[str, float] = {}
    for name in options.methods:
        jobs = [_job(options, name, seed=TUNING_SEED, learning_rate=rate) for rate in rates]
        found = {job.learning_rate: one.points[-1].perplexity for job, one in run_all(jobs)}
        known = {rate: value for rate, value in found.items() if math.isfinite(value)}
        best[name] = min(known, key=lambda rate: known[rate], default=min(rates))
        print(f"{name}: {found}, so {best[name]:g}", flush=True)
    return best


def _line(one: MethodRun) -> str:
    last = one.points[-1]
    return (
        f"{one.method:<26} seed {one.seed}: perplexity {one.points[0].perplexity:.1f} -> "
        f"{last.perplexity:.2f}, {last.seconds:.0f} s emulated, {last.bytes / 1e6:.1f} MB"
    )


def _settings(
    options: argparse.Namespace, rates: Mapping[str, float], *, seconds: float
) -> dict[str, object]:
    """Return what was run, as the page shows it."""
    return {
        "base": "tiny-gpt2 of the demo (6 blocks, hidden 192), E2E sample of the demo",
        "steps": f"{options.rounds} rounds of {options.steps}",
        "sequences of a device in a step": f"{options.batch} on average",
        "seeds": options.seeds,
        "text of the devices": (
            "equal mixtures" if options.alpha is None
            else f"kinds of food by Dirichlet({options.alpha:g})"
        ),
        "held-out lines": options.held_out,
        "learning rate": {name: f"{rate:g}" for name, rate in rates.items()},
        "ranks": (
            f"{EQUAL_RANK} everywhere, or the devices' own; alpha twice the rank, of "
            f"{', '.join(TARGETS)}"
        ),
        "server": f"speed {SERVER_SPEED:g}",
        "devices": {device.name: _device(device) for device in FLEET},
        "speed": "1 is one thread of the machine that was measured",
        "memory": "budgets bind where a part is planned; methods without a cut ignore them",
        "versions": (
            f"hsplit {version.VERSION}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, Python {platform.python_version()}"
        ),
        "took": f"{seconds / 60:.1f} minutes in {options.processes} processes",
    }  # fmt: skip


def _device(device: EmulatedDevice) -> dict[str, object]:
    return {
        "speed": device.speed,
        "link": f"{device.mbit_per_s:g} Mbit/s, {device.latency_ms:g} ms",
        "memory": f"as for {device.blocks} blocks at the mean batch",
        "own rank": device.rank,
    }


if __name__ == "__main__":
    main()
