"""Held-out perplexity with ranks where the weights matter, against the same rank everywhere.

The small base learns E2E with the same number of adapter parameters, steps and sequences; only
where the ranks are differs. Everything runs on one device that holds the whole model, which by
the first law is what a split fleet computes. As in a run, all ranks are equal in a first round;
then a probe, the planner's own rule, an aggregation and its hand-back give others. The learning
rate is tuned for each way by itself, over the same rates, on a seed of its own. ``--methods`` adds
the roots of the scores (tempered), and two controls that say whether it is importance that does
it: the scores given to the wrong blocks (shuffled), and their inverses.

    make bench-importance          BENCH_ARGS="--ranks 4 8 16 --steps 300 --processes 2"
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from coordinator import demo
from coordinator.aggregation import Contribution, aggregate, initial
from coordinator.handback import Holder, hand_back
from coordinator.importance import from_device, theta
from coordinator.model_store import ModelStore
from coordinator.planning.device_plan import adaptable_shapes, adapted
from coordinator.planning.rank_policy import ranks_by_importance
from edge_agent.backends.base import MicroBatch
from edge_agent.backends.torch_backend import TorchBackend
from edge_agent.dataset import Dataset
from edge_agent.vocabulary import Vocabulary
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.split_system import tokens_of
from tests.support.tiny_models import TinyModel
from tests.testbed.bench_report import write_report
from tests.testbed.joined_text import joined

DEVICE = DeviceId("bench")
BATCH, MAX_LENGTH, EVALUATE_BATCH = 8, 128, 24
PROBE_SEQUENCES, PROBE_MICRO_BATCH = 64, 8
LORA_ALPHA = 16.0
TARGETS = ("c_attn", "c_proj", "c_fc")
WARM_UP_STEPS = 10
TOLERANCE = 1e-6
TUNING_SEED = 100
METHODS = ("uniform", "importance", "tempered", "shuffled", "inverse")


@dataclass(frozen=True)
class Job:
    """One training: what it is called by, and all that decides its outcome."""

    method: str
    rank: int
    learning_rate: float
    seed: int
    steps: int
    first_round: int
    split_layer: int | None

    @property
    def lora(self) -> LoraTerms:
        return LoraTerms(r=self.rank, lora_alpha=LORA_ALPHA, target_modules=TARGETS)


@dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    job: Job
    perplexity: float
    parameters: int
    ranks: Mapping[str, int]


class Bench:
    """The base, its data, and one device that holds all of it."""

    def __init__(self, job: Job, folder: Path) -> None:
        base = demo.base_folder()
        config = json.loads((base / "config.json").read_text())
        model = TinyModel(config, load_file(base / "model.safetensors"))
        self.job = job
        self.architecture = model.architecture
        self.blocks = range(self.architecture.block_count)
        description = ModelStore.open(str(base), cache_folder=folder).describe()
        vocabulary = Vocabulary(base / "tokenizer.json", description)
        shards = demo.shards()
        self.data = Dataset(
            training=joined(
                vocabulary, [shard.training for shard in shards], max_length=MAX_LENGTH
            ),
            held_out=joined(
                vocabulary, [shard.held_out for shard in shards], max_length=MAX_LENGTH
            ),
            seed=job.seed,
            device_id=DEVICE,
        )
        self.backend = TorchBackend("cpu", threads=1)
        self.backend.load(
            model.front_base(folder, split_layer=self.blocks.stop, head=True),
            device_id=DEVICE,
            training=TrainingTerms(max_length=MAX_LENGTH, seed=job.seed, total_steps=job.steps),
            lora=job.lora,
            optimizer=OptimizerTerms(learning_rate=job.learning_rate, warmup_steps=WARM_UP_STEPS),
        )
        self.update = initial(adaptable_shapes(job.lora, self.architecture))

    def importance(self) -> Mapping[str, float]:
        """Return the score of every target, measured on what is trained on next."""
        modules = self.architecture.adaptable_modules(self.job.lora, blocks=self.blocks)
        self.backend.begin_probe(modules)
        tokens = self._run(
            self.job.first_round, count=PROBE_SEQUENCES, micro_batch=PROBE_MICRO_BATCH
        )
        report = from_device(self.backend.end_probe(), tokens, candidates=modules)
        return theta([report])

    def ranks(self, scores: Mapping[str, float]) -> dict[str, int]:
        """Return each module's rank by its score; each side of a cut has a budget of its own."""
        ranks, _ = adapted(self.job.lora, self.architecture, self.blocks)
        cut = self.job.split_layer or self.blocks.stop
        found: dict[str, int] = {}
        for part in (range(cut), range(cut, self.blocks.stop)):
            own = {m: r for m, r in ranks.items() if self.architecture.block_of(m) in part}
            features = {module: self.architecture.features(module) for module in own}
            budget = sum(rank * sum(features[module]) for module, rank in own.items())
            found |= ranks_by_importance(scores, features, budget_parameters=budget)
        return found

    def _scores(self) -> Mapping[str, float]:
        """Return the scores that the method goes by."""
        if self.job.method == "uniform":
            return {}
        scores = self.importance()
        if self.job.method == "inverse":
            return {module: 1 / score for module, score in scores.items()}
        if self.job.method == "importance":
            return scores
        if self.job.method == "tempered":  # half way, in logarithms, to equal scores
            return {module: math.sqrt(score) for module, score in scores.items()}
        # Among modules of one kind, so that only the block that a score belongs to is wrong.
        random = np.random.default_rng(self.job.seed)
        shuffled: dict[str, float] = {}
        for kind in self.architecture.linears:
            own = [module for module in scores if module.endswith("." + kind)]
            moved = random.permutation([scores[module] for module in own]).tolist()
            shuffled |= zip(own, moved, strict=True)
        return shuffled

    def train(self) -> Outcome:
        """Train in two rounds, the second with the ranks of the method; evaluate."""
        uniform, _ = adapted(self.job.lora, self.architecture, self.blocks)
        self._hand_back(uniform, round_=1)
        self._steps(range(self.job.first_round))
        scores = self._scores()
        ranks = self.ranks(scores) if scores else uniform
        self._hand_back(ranks, round_=2)
        self._steps(range(self.job.first_round, self.job.steps))
        sizes = [rank * sum(self.architecture.features(module)) for module, rank in ranks.items()]
        return Outcome(self.job, self._perplexity(), sum(sizes), ranks)

    def _hand_back(self, ranks: Mapping[str, int], *, round_: int) -> None:
        """Aggregate what was trained, and take over what a run would hand back at these ranks."""
        contribution = Contribution(
            device=DEVICE,
            split_layer=self.blocks.stop,
            target_tokens=1,
            adapters=self.backend.adapters(),
        )
        if round_ > 1:
            self.update = aggregate(
                self.update, [contribution], server={}, mode="residual", tolerance=TOLERANCE
            ).update
        used = {module: rank for module, rank in ranks.items() if rank}
        holder = Holder(
            name=DEVICE,
            blocks=self.blocks,
            ranks=used,
            # As the planner does: a module keeps the scaling that the terms give it.
            scalings=dict.fromkeys(used, LORA_ALPHA / self.job.rank),
            # Blocks of a fleet have several holders, so that a hand-back replaces every module.
            fresh=True,
        )
        seed = self.job.seed
        handed = hand_back(self.update, [holder], mode="residual", seed=seed, round_=round_)
        self.update = handed.update
        self.backend.set_adapters(handed.adapters_of(DEVICE), fold=False)

    def _steps(self, steps: range) -> None:
        for step in steps:
            tokens = self._run(step, count=BATCH, micro_batch=BATCH)
            self.backend.step(step, target_tokens=tokens)

    def _run(self, step: int, *, count: int, micro_batch: int) -> int:
        """Run the sequences of a step from end to end; return their target tokens."""
        batches = self.data.micro_batches(step * BATCH, batch=count, micro_batch=micro_batch)
        for index, batch in enumerate(batches):
            self.backend.whole(MicroBatch(step, index), batch, train=True)
        return tokens_of(batches)

    def _perplexity(self) -> float:
        batches = self.data.evaluation_batches(EVALUATE_BATCH)
        nats = sum(
            self.backend.whole(MicroBatch(0, index), batch, train=False)
            for index, batch in enumerate(batches)
        )
        return math.exp(nats / tokens_of(batches))


def run(job: Job) -> Outcome:
    """Carry out one job, in whatever process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = Bench(job, Path(folder)).train()
    print(
        f"  {job.method:<11} r {job.rank:<3} seed {job.seed:<4} lr {job.learning_rate:<6g} "
        f"perplexity {outcome.perplexity:.3f}",
        flush=True,
    )
    return outcome


def main() -> None:
    """Tune, measure, print a table, write build/bench/importance.json."""
    options = _options()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        tuning = pool.map(run, _tuning_jobs(options), chunksize=1)
        rates = _best_rates(tuning) or {
            (job.method, job.rank): job.learning_rate for job in _jobs(options)
        }
        jobs = [
            dataclasses.replace(job, learning_rate=rates[job.method, job.rank], seed=seed)
            for job in _jobs(options)
            for seed in range(options.seeds)
        ]
        outcomes = pool.map(run, jobs, chunksize=1)
    _report([_row(way, outcomes) for way in rates], [*tuning, *outcomes], options)


def _jobs(options: argparse.Namespace) -> list[Job]:
    return [
        Job(
            method=method,
            rank=rank,
            learning_rate=options.rates[0],
            seed=TUNING_SEED,
            steps=options.steps,
            first_round=options.first_round,
            split_layer=options.split_layer,
        )
        for rank in options.ranks
        for method in options.methods
    ]


def _tuning_jobs(options: argparse.Namespace) -> list[Job]:
    if len(options.rates) == 1:
        return []  # there is nothing to choose from
    return [
        dataclasses.replace(job, learning_rate=rate)
        for job in _jobs(options)
        for rate in options.rates
    ]


Way = tuple[str, int]
"""A method at a rank."""


def _best_rates(tuning: Sequence[Outcome]) -> dict[Way, float]:
    best: dict[Way, Outcome] = {}
    for outcome in tuning:
        way = outcome.job.method, outcome.job.rank
        if way not in best or outcome.perplexity < best[way].perplexity:
            best[way] = outcome
    return {way: outcome.job.learning_rate for way, outcome in best.items()}


def _row(way: Way, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    method, rank = way
    own = [one for one in outcomes if (one.job.method, one.job.rank) == way]
    uniform = {
        one.job.seed: one.perplexity
        for one in outcomes
        if (one.job.method, one.job.rank) == ("uniform", rank)
    }
    found = [one.perplexity for one in own]
    return {
        "method": method,
        "rank": rank,
        "parameters": max(one.parameters for one in own),
        "learning_rate": own[0].job.learning_rate,
        "perplexities": found,
        "mean": statistics.mean(found),
        "spread": statistics.stdev(found) if len(found) > 1 else 0.0,
        # Seed by seed, as both have the same sequences in the same order.
        "against_uniform": [
            one.perplexity / uniform[one.job.seed] - 1 for one in own if one.job.seed in uniform
        ],
    }


def _report(
    rows: list[dict[str, Any]], outcomes: Sequence[Outcome], options: argparse.Namespace
) -> None:
    print(
        f"{options.steps} steps of {BATCH} sequences, equal ranks in the first "
        f"{options.first_round}; {options.seeds} seeds, rates "
        f"{', '.join(map(str, options.rates))} tuned on a seed of their own"
    )
    print(
        f"{'ranks':<12}{'r':>4}{'parameters':>12}{'rate':>8}{'perplexity':>12}{'spread':>8}"
        f"{'against uniform, by seed':>28}"
    )
    for row in rows:
        against = "  ".join(f"{one:+.1%}" for one in row["against_uniform"])
        print(
            f"{row['method']:<12}{row['rank']:>4}{row['parameters']:>12}"
            f"{row['learning_rate']:>8g}{row['mean']:>12.3f}{row['spread']:>8.3f}{against:>28}"
        )
    print("aim: importance below uniform")
    found = {
        "options": vars(options),
        "rows": rows,
        "trainings": [asdict(outcome) for outcome in outcomes],
    }
    write_report("importance", found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16], help="of uniform ranks")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["uniform", "importance"])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3, 7e-3, 1e-2, 1.4e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--first-round", type=int, default=20, help="steps with equal ranks")
    parser.add_argument(
        "--split-layer", type=int, help="each side of this cut has a budget of its own"
    )
    parser.add_argument("--processes", type=int, default=1, help="trainings at once, a core each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
