"""What a program is given to do when it measures itself, and the points that come of it.

Pure. The points are such that every term of `shared.costs` can be told from the others.

Shape suffixes: N packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.adapters import HeldAdapters, LoraPair, ModuleAdapter
from shared.architecture import ModelArchitecture
from shared.protocol.profile import BlockPoint, HeadPoint
from shared.repeats import Timing
from shared.terms import LoraTerms

Ranks: TypeAlias = Mapping[str, int]

MOST_BLOCKS = 3
"""More blocks would tell no more, and may not fit a device that is to get fewer."""
RANK_FACTOR = 4
FALLBACK_RANK = 8
"""Where the run's terms give every module rank 0, and only a plan will say more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One point: ``part`` of the work of ``blocks`` blocks, on micro-batches of one size.

    ``in_flight``: how many of them are kept at once. ``part``: the blocks' forward and backward
    pass, the head's, or an optimizer step over the smaller or the larger adapters.
    """

    part: Literal["blocks", "head", "optimizer"] = "blocks"
    blocks: int
    larger_adapters: bool = False
    sequences: int
    length: int
    in_flight: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.sequences * self.length

    @property
    def size(self) -> int:
        """What its time, and its memory beyond the weights, are about proportional to."""
        return self.blocks * self.tokens * self.in_flight

    def halved(self) -> Load | None:
        """Return the same with half of one of its numbers; None: no smaller one."""
        if self.sequences > 1:
            return replace(self, sequences=self.sequences // 2)
        if self.length > 1:
            return replace(self, length=self.length // 2)
        return replace(self, in_flight=self.in_flight // 2) if self.in_flight > 1 else None

    def __str__(self) -> str:
        """Say it in words."""
        part = "" if self.part == "blocks" else f"the {self.part} at "
        adapters = " with larger adapters" if self.larger_adapters else ""
        blocks = f"{self.blocks} block{'s' if self.blocks > 1 else ''}"
        several = f"{self.in_flight} times " if self.in_flight > 1 else ""
        return f"{part}{blocks}{adapters} on {several}{self.sequences} x {self.length} tokens"


def loads(available_blocks: int, *, micro_batch: int, length: int, head: bool) -> tuple[Load, ...]:
    """Return the points to measure: fewest blocks first, and of equal blocks the smaller.

    Two numbers of blocks where there are as many, two numbers of tokens, two sizes of adapters,
    one and two micro-batches at once. The order is that of need: what comes first is of use
    without the rest.
    """
    full = Load(blocks=1, sequences=micro_batch, length=length)
    small = replace(full, sequences=1) if micro_batch > 1 else full.halved() or full
    sizes = (small, full) if small != full else (full,)
    many = min(MOST_BLOCKS, available_blocks)
    more = tuple(replace(size, blocks=many) for size in sizes) if many > 1 else ()
    heads = tuple(replace(size, part="head") for size in sizes) if head else ()
    largest = replace(full, blocks=many, larger_adapters=True, in_flight=2)
    return (
        *sizes,
        *heads[-1:],  # as dear as many blocks: a plan that took it for free would be worthless
        *more,
        *heads[:-1],
        replace(small, part="optimizer"),
        largest,
        replace(small, blocks=many, part="optimizer", larger_adapters=True),
    )


def two_ranks(
    architecture: ModelArchitecture, lora: LoraTerms, *, blocks: range
) -> tuple[Ranks, Ranks]:
    """Return the ranks of the modules of ``blocks`` in two sizes: the run's, and larger ones.

    The others are `RANK_FACTOR` times as large, as far as the weights' sides allow.

    Raises:
        PlanError: a target module does not exist, or a rank exceeds a weight's smaller side.
    """
    ranks = architecture.target_modules(lora, blocks=blocks)
    if not ranks:
        anyway = replace(lora, r=1, rank_pattern={})
        named = architecture.target_modules(anyway, blocks=blocks)
        ranks = {m: min(FALLBACK_RANK, *architecture.features(m)) for m in named}
    larger = {
        module: min(RANK_FACTOR * rank, *architecture.features(module))
        for module, rank in ranks.items()
    }
    return ranks, larger


def parameter_count(architecture: ModelArchitecture, ranks: Ranks) -> int:
    """Return how many values LoRA factors of these ranks have."""
    return sum(rank * sum(architecture.features(module)) for module, rank in ranks.items())


def fresh_adapters(architecture: ModelArchitecture, ranks: Ranks, *, seed: int) -> HeldAdapters:
    """Return adapters as they are after a few steps: A random, B small and not zero."""
    random = np.random.default_rng(seed)
    adapters: dict[str, ModuleAdapter] = {}
    for module, rank in ranks.items():
        inputs, outputs = architecture.features(module)
        a_RI = random.standard_normal((rank, inputs), dtype=np.float32) / np.sqrt(inputs)
        b_OR = 1e-3 * random.standard_normal((outputs, rank), dtype=np.float32)
        adapters[module] = ModuleAdapter(
            LoraPair(a_RI.astype(np.float32), b_OR.astype(np.float32), 1.0)
        )
    return adapters


def block_point(
    load: Load, forward: Timing, backward: Timing, *, adapter_parameters: int, peak_bytes: int
) -> BlockPoint:
    """Return what a load of blocks took, with the wider of both spreads."""
    return BlockPoint(
        blocks=load.blocks,
        adapter_parameters=adapter_parameters,
        sequences=load.sequences,
        length=load.length,
        in_flight=load.in_flight,
        forward_s=forward.seconds,
        backward_s=backward.seconds,
        spread=max(forward.spread, backward.spread),
        peak_bytes=peak_bytes,
    )


def head_point(load: Load, timing: Timing, *, extra_bytes: int) -> HeadPoint:
    """Return what a load of the head took."""
    return HeadPoint(
        tokens=load.tokens,
        seconds=timing.seconds,
        spread=timing.spread,
        extra_bytes=extra_bytes,
    )


def random_tokens(count: int, *, vocab_size: int, seed: int) -> npt.NDArray[np.int32]:
    """Return ``count`` token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, count, dtype=np.int32)


def rows_read(load: Load, architecture: ModelArchitecture) -> int:
    """Return how many rows of a load's activations the head reads."""
    return load.sequences if architecture.classifies else load.tokens


def random_labels(
    load: Load, architecture: ModelArchitecture, *, seed: int
) -> npt.NDArray[np.int32]:
    """Return a target for each position that a head of this task would read, -100 elsewhere."""
    targets = architecture.output_count
    if not architecture.classifies:
        return random_tokens(load.tokens, vocab_size=targets, seed=seed)
    labels = np.full((load.sequences, load.length), -100, dtype=np.int32)
    at = 0 if architecture.family.classifier.reads == "first" else -1
    labels[:, at] = random_tokens(load.sequences, vocab_size=targets, seed=seed)
    return labels.reshape(-1)


def small_values_ND(tokens: int, hidden_size: int, *, seed: int) -> npt.NDArray[np.float32]:
    """Return values as activations or their gradients may be: small, not zero or denormal."""
    random = np.random.default_rng(seed)
    return (1e-3 * random.standard_normal((tokens, hidden_size))).astype(np.float32)
