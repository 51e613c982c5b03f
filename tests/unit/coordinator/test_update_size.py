"""The size of an update is what a dense computation of it says."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation import SERVER, Contribution, aggregate, initial
from coordinator.handback import Holder, hand_back
from coordinator.update_size import adapters_size, classifier_size
from coordinator.wire_adapters import to_wire
from shared.adapters import LoraPair, ModuleAdapter

SHAPES = {"h.0.x": (6, 5), "h.1.x": (4, 7)}
RATES = 0.25


def holder(name, *, blocks, rank, scaling):
    names = [module for block, module in enumerate(SHAPES) if block < blocks]
    ranks, scalings = dict.fromkeys(names, rank), dict.fromkeys(names, scaling)
    return Holder(name=name, blocks=range(blocks), ranks=ranks, scalings=scalings, fresh=False)


ONE = holder("one", blocks=2, rank=3, scaling=2.0)
TWO = holder("two", blocks=1, rank=3, scaling=0.5)
BACK = Holder(
    name=SERVER, blocks=range(1, 2), ranks={"h.1.x": 3}, scalings={"h.1.x": 1.0}, fresh=False
)


def trained(random, start, *, by):
    """Return a pair that moved by about ``by`` in every element."""
    a_RI = start.a_RI + by * random.normal(size=start.a_RI.shape)
    b_OR = start.b_OR + by * random.normal(size=start.b_OR.shape)
    return LoraPair(a_RI.astype(np.float32), b_OR.astype(np.float32), start.scaling)


def wire_bytes(adapter):
    """Return how many bytes of factors a module is in a message."""
    (sent,) = to_wire({"m": adapter})
    frames = (sent.a, sent.b, sent.frozen_a, sent.frozen_b)
    return sum(frame.nbytes for frame in frames if frame is not None)


def expected(before, after, holder):
    square = sum(
        np.linalg.norm(after[m].delta_OI() - before[m].delta_OI()) ** 2
        / (holder.scalings[m] ** 2 * holder.ranks[m])
        for m in after
    )
    weights = sum(SHAPES[m][0] * SHAPES[m][1] for m in after)
    return np.sqrt(square / weights) / RATES


@pytest.mark.parametrize("mode", ["residual", "merge", "svd", "average", "zero-pad"])
def test_it_is_what_changed_since_the_round_began_whatever_was_handed_back(mode):
    """Device one goes on undisturbed in round 2 (but in `merge`); two joins in round 3."""
    random = np.random.default_rng(3)
    rounds = [[ONE], [ONE], [ONE, TWO, BACK], [ONE, TWO, BACK]]
    held = {"one": {}, "two": {}, SERVER: {}}
    update, deltas, kept = initial(SHAPES), {}, []
    for number, holders in enumerate(rounds, start=1):
        handed = hand_back(update, holders, mode=mode, seed=1, round_=number, deltas=deltas)
        kept.append(len(SHAPES) - len(handed.replaced))
        for one in holders:
            given = handed.adapters_of(one.name)
            before = held[one.name] | {m: adapter.trainable for m, adapter in given.items()}
            after = {m: trained(random, pair, by=0.1) for m, pair in before.items()}
            assert handed.bytes_to(one.name) == sum(map(wire_bytes, given.values()))
            delivered = [ModuleAdapter(pair) for pair in after.values()]
            assert handed.bytes_from(one.name) == sum(map(wire_bytes, delivered))
            size = adapters_size(
                after, holder=one, update=handed.update, mode=mode, learning_rates=RATES
            )
            assert size == pytest.approx(expected(before, after, one), rel=1e-5)
            held[one.name] = after
        contributions = [
            Contribution(
                device=one.name,
                split_layer=one.blocks.stop,
                target_tokens=10,
                adapters=held[one.name],
            )
            for one in holders
            if one is not BACK
        ]
        back = held[SERVER]
        result = aggregate(handed.update, contributions, server=back, mode=mode, tolerance=1e-12)
        update, deltas = result.update, result.deltas
    assert kept == ([0, 0, 0, 0] if mode == "merge" else [0, 2, 0, 0])


def test_rank_scaling_and_length_of_the_front_do_not_make_a_device_larger():
    """Parameters that move alike give sizes that are alike."""
    random = np.random.default_rng(4)
    shapes = {f"h.{block}.x": (64, 64) for block in range(6)}
    update = initial(shapes)
    sizes = []
    for blocks, rank, alpha in ((1, 1, 16), (3, 8, 16), (6, 32, 32)):
        names = list(shapes)[:blocks]
        ranks = dict.fromkeys(names, rank)
        scalings = dict.fromkeys(names, alpha / rank)
        own = Holder(name="d", blocks=range(blocks), ranks=ranks, scalings=scalings, fresh=True)
        pairs = {
            m: LoraPair(
                random.uniform(-0.1, 0.1, (rank, 64)),
                0.01 * random.choice([-1.0, 1.0], (64, rank)),
                alpha / rank,
            )
            for m in names
        }
        options = {"holder": own, "update": update, "mode": "residual", "learning_rates": RATES}
        sizes.append(adapters_size(pairs, **options))
    assert max(sizes) / min(sizes) < 1.2


def test_nothing_trained_is_of_size_zero():
    options = {"holder": ONE, "update": initial(SHAPES), "mode": "residual"}
    pairs = {m: LoraPair(np.ones((3, i)), np.ones((o, 3)), 2.0) for m, (o, i) in SHAPES.items()}
    assert adapters_size({}, **options, learning_rates=RATES) == 0.0
    assert adapters_size(pairs, **options, learning_rates=0.0) == 0.0


def test_a_classifier_moves_by_the_root_mean_square_of_its_weights():
    old = {"w": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    new = {"w": np.full((2, 3), 0.5, np.float32), "b": np.full(2, 1.5, np.float32)}
    assert classifier_size(new, started_from=old, learning_rates=RATES) == pytest.approx(2.0)
