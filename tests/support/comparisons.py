"""A comparison as a runner would measure it: made-up figures of a likely size and shape."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.testbed.comparison.results import (
    Comparison,
    Kind,
    MethodRun,
    Point,
    RoundPoint,
)

STEPS, EVERY, ROUND = 400, 20, 40


@dataclass(frozen=True)
class Like:
    """How a method does: where its perplexity ends, how soon, and what a step and a round cost."""

    name: str
    kind: Kind
    final: float
    pace: float
    step_s: float
    step_bytes: int
    error: float
    split_layers: tuple[int, ...]
    ranks: tuple[int, ...]
    memory_gb: float


PLANNED, UNIFORM, WHOLE = (5, 3, 2, 2, 4), (2,) * 5, (12,) * 5
UNEQUAL, EQUAL = (32, 16, 4, 4, 16), (8,) * 5

LIKELY = (
    Like("hsplitlora", "strategy", 8.9, 40, 1.6, 1_650_000, 4e-8, PLANNED, UNEQUAL, 1.1),
    Like("splitlora", "strategy", 9.15, 46, 2.9, 1_640_000, 0.11, UNIFORM, EQUAL, 1.3),
    Like("hlora", "strategy", 9.4, 55, 6.2, 60_000, 0.06, WHOLE, UNEQUAL, 3.9),
    Like("fedlora", "strategy", 9.9, 70, 6.1, 60_000, 0.35, WHOLE, EQUAL, 3.9),
    Like("hetlora", "strategy", 10.4, 75, 6.3, 60_000, 0.52, WHOLE, UNEQUAL, 3.9),
    Like("flora", "strategy", 9.2, 60, 6.4, 150_000, 0.0, WHOLE, UNEQUAL, 3.9),
    Like("ffa-lora", "strategy", 11.3, 90, 5.9, 30_000, 0.0, WHOLE, EQUAL, 3.7),
    Like("cenlora", "reference", 8.7, 38, 0.9, 0, math.nan, (), (), 4.6),
    Like("no importance", "ablation", 9.02, 42, 1.6, 1_650_000, 4e-8, PLANNED, (16,) * 5, 1.1),
    Like("no planned split", "ablation", 8.93, 40, 2.8, 1_640_000, 4e-8, UNIFORM, UNEQUAL, 1.3),
    Like("averaged factors", "ablation", 10.1, 60, 1.6, 1_650_000, 0.44, PLANNED, UNEQUAL, 1.1),
)

_SPEEDS = {"agx": 1.0, "laptop": 0.7, "nano-1": 0.15, "nano-2": 0.2, "orin": 0.5}
SETTINGS = {
    "title": "quick comparison",
    "model": "tiny-gpt2",
    "data": "E2E, 3,000 lines, Dirichlet over 'name' with alpha 0.5",
    "seeds": [0, 1, 2],
    "rounds": {"count": 10, "steps": 40},
    "versions": {"hsplit": "0.1.0", "torch": "2.13.0"},
    "devices": {
        name: {"speed": speed, "uplink": f"{100 * speed:.0f} Mbit/s", "memory_bytes": 20e9 * speed}
        for name, speed in _SPEEDS.items()
    },
}


def comparison(
    methods: Sequence[Like] = LIKELY, *, seeds: int = 3, **settings: object
) -> Comparison:
    """Return a comparison of these methods."""
    runs = tuple(_run(like, seed) for like in methods for seed in range(seeds))
    return Comparison(settings={**SETTINGS, **settings}, methods=runs)


def _run(like: Like, seed: int) -> MethodRun:
    noise = random.Random(f"{like.name}/{seed}")
    shift = 1 + 0.006 * noise.gauss(0, 1)
    points = []
    for step in range(0, STEPS + 1, EVERY):
        learnt = 1 - math.exp(-((step / like.pace) ** 0.7))
        # On the scale of log perplexity, from 211 to a little above the final one.
        loss = math.log(211) * (1 - learnt) + math.log(like.final * shift) * learnt
        loss += 0.003 * noise.gauss(0, 1) if step else 0
        points.append(
            Point(
                step=step,
                seconds=step * like.step_s * (1 + 0.01 * seed),
                bytes=step * like.step_bytes * 5,
                perplexity=math.exp(loss),
                loss=loss,
            )
        )
    rounds = () if math.isnan(like.error) else _rounds(like, points, noise)
    memory = {name: like.memory_gb * 1e9 * (1 - 0.1 * i) for i, name in enumerate(_SPEEDS)}
    return MethodRun(
        method=like.name,
        seed=seed,
        kind=like.kind,
        split_layers=dict(zip(_SPEEDS, like.split_layers, strict=False)),
        ranks=dict(zip(_SPEEDS, like.ranks, strict=False)),
        points=tuple(points),
        rounds=rounds,
        peak_memory_bytes=memory if like.split_layers else {},
        peak_memory="predicted",
        note="The whole model on one machine." if like.kind == "reference" else "",
    )


def _rounds(like: Like, points: Sequence[Point], noise: random.Random) -> tuple[RoundPoint, ...]:
    return tuple(
        RoundPoint(
            round=number,
            aggregation_error=like.error * math.exp(0.3 * noise.gauss(0, 1)),
            training_loss=points[number * ROUND // EVERY].loss + 0.02 * noise.random(),
        )
        for number in range(1, STEPS // ROUND + 1)
    )


def points(*perplexities: float, step_s: float = 2.0) -> tuple[Point, ...]:
    """Return evaluations after every tenth step, 1000 bytes apart."""
    return tuple(
        Point(step=10 * i, seconds=10 * i * step_s, bytes=1000 * i, perplexity=p, loss=p)
        for i, p in enumerate(perplexities)
    )


def run(
    name: str,
    *perplexities: float,
    seed: int = 0,
    kind: Kind = "strategy",
    errors: Sequence[float] = (),
    step_s: float = 2.0,
) -> MethodRun:
    """Return a run with these evaluations and aggregation errors."""
    return MethodRun(
        method=name,
        seed=seed,
        kind=kind,
        split_layers={"nano": 2},
        ranks={"nano": 4},
        points=points(*perplexities, step_s=step_s),
        rounds=tuple(
            RoundPoint(round=i, aggregation_error=e, training_loss=1.0)
            for i, e in enumerate(errors, start=1)
        ),
        peak_memory_bytes={"nano": 100.0 + seed},
        peak_memory="measured",
    )
