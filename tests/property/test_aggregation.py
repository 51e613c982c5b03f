"""Laws 3 and 4 for any plans: aggregation adds no noise, hand-back loses nothing.

A `World` plays several rounds with real hand-backs, but random changes in place of training;
it keeps what every holder holds as dense float64 matrices and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation import (
    SERVER,
    Aggregated,
    Contribution,
    GlobalUpdate,
    aggregate,
    block_of,
    block_weights,
    initial,
)
from coordinator.factoring import Term, recompress
from coordinator.handback import Holder, hand_back
from shared.adapters import AdapterState, Array, LoraPair, ModuleAdapter
from shared.terms import HandBackMode

BLOCKS = 4
SHAPES = {
    f"model.layers.{block}.{name}": shape
    for block in range(BLOCKS)
    for name, shape in (("self_attn.q_proj", (7, 6)), ("mlp.down_proj", (5, 9)))
}
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Seat:
    """One device in one round."""

    name: str
    split_layer: int
    rank_seed: int
    tokens: int
    delivers: bool


@st.composite
def seats(draw: st.DrawFn) -> tuple[Seat, ...]:
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    return tuple(
        Seat(
            name,
            draw(st.integers(1, BLOCKS)),
            draw(st.integers(0, 3)),
            draw(st.integers(0, 1000)),
            draw(st.booleans()),
        )
        for name in names
    )


def holder(name: str, blocks: range, *, rank_seed: int, fresh: bool) -> Holder:
    """A holder with ranks 0 to 5 and scalings that differ from module to module."""
    random = np.random.default_rng(rank_seed)
    drawn = {m: (int(random.integers(0, 6)), float(random.uniform(0.1, 8))) for m in SHAPES}
    mine = {m: v for m, v in drawn.items() if block_of(m) in blocks and v[0] > 0}
    return Holder(
        name=name,
        blocks=blocks,
        ranks={m: rank for m, (rank, _) in mine.items()},
        scalings={m: scaling for m, (_, scaling) in mine.items()},
        fresh=fresh,
    )


def dense(adapter: ModuleAdapter | None, module: str) -> Array:
    total = np.zeros(SHAPES[module])
    if adapter is not None:
        total += adapter.trainable.delta_OI()
        if adapter.frozen is not None:
            total += adapter.frozen.delta_OI()
    return total


def close(actual: Array, expected: Array, *, tolerance: float) -> bool:
    error = np.linalg.norm(actual - expected)
    return bool(error <= tolerance * np.linalg.norm(expected) + 1e-12)


@dataclass
class World:
    """All holders of a run, and the true effective update of each."""

    mode: HandBackMode
    random: np.random.Generator
    update: GlobalUpdate = field(default_factory=lambda: initial(SHAPES))
    deltas: Mapping[str, object] = field(default_factory=dict)
    held: dict[str, dict[str, ModuleAdapter]] = field(default_factory=dict)
    base: dict[str, dict[str, Array]] = field(default_factory=dict)
    blocks: dict[str, range] = field(default_factory=dict)
    round: int = 0

    def start(self, plan: tuple[Seat, ...]) -> None:
        """Hand back to all holders of the plan's round and let them carry it out."""
        self.round += 1
        first = min(seat.split_layer for seat in plan)
        sides = [(seat.name, range(seat.split_layer), seat.rank_seed) for seat in plan]
        sides.append((SERVER, range(first, BLOCKS), 17))
        holders = [
            holder(name, blocks, rank_seed=seed, fresh=self._is_fresh(name, blocks))
            for name, blocks, seed in sides
        ]
        handed = hand_back(
            self.update, holders, mode=self.mode, seed=1, round_=self.round, deltas=self.deltas
        )
        self.update = handed.update
        for one in holders:
            if one.fresh:
                self.held[one.name], self.base[one.name] = {}, {}
            for module, adapter in handed.adapters_of(one.name).items():
                assert block_of(module) in one.blocks
                self._install(one.name, module, adapter, fold=handed.fold)
        self.blocks = {one.name: one.blocks for one in holders}

    def _is_fresh(self, name: str, blocks: range) -> bool:
        gone = name not in self.blocks
        return gone or (self.mode == "merge" and self.blocks[name] != blocks)

    def _install(self, name: str, module: str, adapter: ModuleAdapter, *, fold: bool) -> None:
        if fold and adapter.frozen is not None:
            before = self.base[name].get(module, np.zeros(SHAPES[module]))
            self.base[name][module] = before + adapter.frozen.delta_OI()
            adapter = replace(adapter, frozen=None)
        self.held[name][module] = adapter

    def effective(self, name: str, module: str) -> Array:
        folded = self.base[name].get(module, np.zeros(SHAPES[module]))
        return folded + dense(self.held[name].get(module), module)

    def train(self, names: list[str]) -> None:
        for name in names:
            for module, adapter in self.held[name].items():
                if block_of(module) in self.blocks[name]:
                    pair = LoraPair(
                        self._moved(adapter.trainable.a_RI),
                        self._moved(adapter.trainable.b_OR),
                        adapter.trainable.scaling,
                    )
                    self.held[name][module] = replace(adapter, trainable=pair)

    def _moved(self, factor: Array) -> Array:
        return (factor + 0.3 * self.random.standard_normal(factor.shape)).astype(np.float32)

    def delivered(self, name: str) -> AdapterState:
        return {
            module: adapter.trainable
            for module, adapter in self.held[name].items()
            if block_of(module) in self.blocks[name] and adapter.trainable.rank > 0
        }

    def play(self, plan: tuple[Seat, ...]) -> Aggregated:
        """Train one round and aggregate it."""
        through = [s for s in plan if s.tokens > 0]
        self.train([seat.name for seat in through])
        if any(seat.split_layer < BLOCKS for seat in through):
            self.train([SERVER])
        outcome = aggregate(
            self.update,
            self.contributions(plan),
            server=self.delivered(SERVER),
            mode=self.mode,
            tolerance=TOLERANCE,
        )
        self.update, self.deltas = outcome.update, outcome.deltas
        return outcome

    def contributions(self, plan: tuple[Seat, ...]) -> tuple[Contribution, ...]:
        return tuple(
            Contribution(
                device=seat.name,
                split_layer=seat.split_layer,
                target_tokens=seat.tokens,
                adapters=self.delivered(seat.name) if seat.delivers else None,
            )
            for seat in plan
        )


def weighted_mean(world: World, plan: tuple[Seat, ...], module: str) -> Array | None:
    """The mean of effective updates by the rule's own words, dense; None: nobody trained."""
    block = block_of(module)
    shares = [
        (seat.name, seat.tokens) for seat in plan if seat.split_layer > block and seat.delivers
    ]
    shares += [(SERVER, seat.tokens) for seat in plan if seat.split_layer <= block]
    total = sum(tokens for _, tokens in shares)
    if total == 0:
        return None
    parts = (tokens / total * world.effective(name, module) for name, tokens in shares if tokens)
    return np.asarray(sum(parts))


@pytest.mark.parametrize("mode", ["residual", "merge"])
@settings(max_examples=60, deadline=None)
@given(plans=st.lists(seats(), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_every_round_is_the_exact_mean_and_every_holder_starts_from_it(mode, plans, seed):
    world = World(mode, np.random.default_rng(seed))
    for plan in plans:
        before = {m: one.total.delta_OI() for m, one in world.update.items()}
        world.start(plan)
        for name, blocks in world.blocks.items():
            for module in (m for m in SHAPES if block_of(m) in blocks):
                assert close(world.effective(name, module), before[module], tolerance=1e-5)
        world.play(plan)
        for module in SHAPES:
            mean = weighted_mean(world, plan, module)
            expected = before[module] if mean is None else mean
            # What the holders hold is rounded to float32, which is not the aggregation's noise.
            allowed = TOLERANCE + 2e-7
            assert close(world.update[module].total.delta_OI(), expected, tolerance=allowed)


@settings(max_examples=60, deadline=None)
@given(plan=seats(), seed=st.integers(0, 2**16))
def test_one_aggregation_is_within_the_tolerance_of_the_float64_dense_sum(plan, seed):
    world = World("residual", np.random.default_rng(seed))
    warm = tuple(replace(s, split_layer=BLOCKS, tokens=1, delivers=True) for s in plan)
    world.start(warm)
    world.play(warm)
    world.start(plan)
    handed = {m: one.handed.delta_OI() for m, one in world.update.items()}
    world.play(plan)
    contributions = world.contributions(plan)
    for module, shape in SHAPES.items():
        weights = block_weights(contributions, block_of(module))
        if not weights:
            continue
        u, s, vt = np.linalg.svd(handed[module])
        expected = np.zeros(shape)
        for name, p in weights.items():
            adapter = world.held[name].get(module)
            r = adapter.trainable.rank if adapter else 0
            expected += p * (handed[module] - (u[:, :r] * s[:r]) @ vt[:r])
            expected += p * (adapter.trainable.delta_OI() if adapter else 0.0)
        assert close(world.update[module].total.delta_OI(), expected, tolerance=TOLERANCE)


@given(plan=seats(), block=st.integers(0, BLOCKS - 1))
def test_the_weights_of_a_block_sum_to_one_or_nobody_trained_it(plan, block):
    contributions = [
        Contribution(
            device=seat.name,
            split_layer=seat.split_layer,
            target_tokens=seat.tokens,
            adapters={} if seat.delivers else None,
        )
        for seat in plan
    ]
    weights = block_weights(contributions, block)
    counted = [s for s in plan if s.tokens and (s.delivers or s.split_layer <= block)]
    assert sum(weights.values()) == pytest.approx(1.0 if counted else 0.0, abs=1e-12)
    assert all(p > 0 for p in weights.values())


@given(
    ranks=st.lists(st.integers(0, 6), max_size=5),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    tolerance=st.sampled_from([0.0, 1e-6, 1e-2, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_recompression_keeps_the_tolerance_with_no_rank_too_many(ranks, shape, tolerance, seed):
    random = np.random.default_rng(seed)
    out_features, in_features = shape
    terms = [
        Term(
            random.standard_normal((out_features, r)) * 10.0 ** random.uniform(-4, 2, r),
            random.standard_normal((r, in_features)),
        )
        for r in ranks
    ]
    expected = np.asarray(sum((t.b_OR @ t.a_RI for t in terms), start=np.zeros(shape)))
    result = recompress(terms, shape=shape, tolerance=tolerance)
    delta = result.delta
    norm = np.linalg.norm(expected)
    error = np.linalg.norm(delta.delta_OI() - expected)
    assert error <= tolerance * norm + 1e-13 * norm
    assert error == pytest.approx(result.relative_error * norm, abs=1e-12 * norm)
    assert delta.rank <= min(out_features, in_features, sum(ranks))
    np.testing.assert_allclose(delta.u_OR.T @ delta.u_OR, np.eye(delta.rank), atol=1e-12)
    np.testing.assert_allclose(delta.vt_RI @ delta.vt_RI.T, np.eye(delta.rank), atol=1e-12)
    assert np.all(np.diff(delta.s_R) <= 0)
    singular = np.linalg.svd(expected, compute_uv=False)
    if delta.rank:
        one_less = np.linalg.norm(singular[delta.rank - 1 :])
        assert one_less > tolerance * norm * (1 - 1e-9)
