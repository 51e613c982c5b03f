"""Aggregation and hand-back by example: weights, what stays, what is fresh, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from coordinator.aggregation import (
    SERVER,
    Contribution,
    GlobalUpdate,
    aggregate,
    block_of,
    block_weights,
    initial,
)
from coordinator.factoring import Term, recompress
from coordinator.handback import HandBack, Holder, carry_on, check_adapters, hand_back
from shared.adapters import LoraPair
from shared.errors import NumericsError, PlanError, ProtocolError

FRONT, BACK = "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"
SHAPES = {FRONT: (12, 8), BACK: (12, 8)}


def device(name: str, *, k: int = 1, rank: int = 2, fresh: bool = False) -> Holder:
    modules = [m for m in SHAPES if block_of(m) < k]
    return Holder(
        name=name,
        blocks=range(k),
        ranks=dict.fromkeys(modules, rank),
        scalings=dict.fromkeys(modules, 4.0 / max(rank, 1)),
        fresh=fresh,
    )


def server(*, first: int = 1, fresh: bool = False) -> Holder:
    modules = [m for m in SHAPES if block_of(m) >= first]
    return Holder(
        name=SERVER,
        blocks=range(first, 2),
        ranks=dict.fromkeys(modules, 2),
        scalings=dict.fromkeys(modules, 2.0),
        fresh=fresh,
    )


def trained(handed: HandBack, name: str, *, seed: int = 0) -> Mapping[str, LoraPair]:
    """What a holder delivers after some training of what it was handed."""
    random = np.random.default_rng([seed, *name.encode()])
    return {
        module: LoraPair(
            held.trainable.a_RI + random.standard_normal(held.trainable.a_RI.shape),
            held.trainable.b_OR + random.standard_normal(held.trainable.b_OR.shape),
            held.trainable.scaling,
        )
        for module, held in handed.adapters_of(name).items()
    }


def begin(update: GlobalUpdate, *holders: Holder, round_: int = 1) -> HandBack:
    return hand_back(update, holders, mode="residual", seed=3, round_=round_)


def contribution(name: str, *, k: int, tokens: int, adapters=None) -> Contribution:
    return Contribution(device=name, split_layer=k, target_tokens=tokens, adapters=adapters)


def one_device_round() -> tuple[HandBack, GlobalUpdate]:
    handed = begin(initial(SHAPES), device("a", fresh=True), server(fresh=True))
    contributions = [contribution("a", k=1, tokens=9, adapters=trained(handed, "a"))]
    outcome = aggregate(
        handed.update,
        contributions,
        server=trained(handed, SERVER),
        mode="residual",
        tolerance=1e-6,
    )
    return handed, outcome.update


def test_when_all_deliver_the_weights_are_the_formula_of_the_design():
    contributions = [
        contribution("a", k=1, tokens=100, adapters={}),
        contribution("b", k=2, tokens=300, adapters={}),
    ]
    assert block_weights(contributions, 0) == {"a": 0.25, "b": 0.75}
    assert block_weights(contributions, 1) == {SERVER: 0.25, "b": 0.75}
    assert block_weights(contributions, 5) == {SERVER: 1.0}


def test_a_lost_device_still_counts_where_the_server_took_its_gradients():
    contributions = [
        contribution("lost", k=1, tokens=100),
        contribution("b", k=2, tokens=300, adapters={}),
    ]
    assert block_weights(contributions, 0) == {"b": 1.0}
    assert block_weights(contributions, 1) == {SERVER: 0.25, "b": 0.75}


def test_a_block_that_nobody_trained_keeps_its_update():
    _, update = one_device_round()
    handed = begin(update, device("a", k=2), server(first=2), round_=2)
    outcome = aggregate(
        handed.update,
        [contribution("a", k=2, tokens=50)],
        server={},
        mode="residual",
        tolerance=1e-6,
    )
    assert outcome.weights == {0: {}, 1: {}}
    assert outcome.reports == {}
    for module in SHAPES:
        assert outcome.update[module].total is update[module].total


def test_what_one_holder_alone_trained_is_left_as_it_is():
    _, update = one_device_round()
    handed = begin(update, device("a"), server(), round_=2)
    assert handed.adapters_of("a") == {}
    assert handed.adapters_of(SERVER) == {}


def test_a_sole_holder_that_goes_on_undisturbed_stays_exact_over_rounds():
    handed, update = one_device_round()
    held = handed.adapters_of("a")[FRONT]
    for round_ in (2, 3):
        handed = begin(update, device("a"), server(), round_=round_)
        random = np.random.default_rng(round_)
        pair = LoraPair(
            random.standard_normal(held.trainable.a_RI.shape),
            random.standard_normal(held.trainable.b_OR.shape),
            held.trainable.scaling,
        )
        outcome = aggregate(
            handed.update,
            [contribution("a", k=1, tokens=9, adapters={FRONT: pair})],
            server={},
            mode="residual",
            tolerance=1e-6,
        )
        update = outcome.update
        np.testing.assert_allclose(update[FRONT].total.delta_OI(), pair.delta_OI(), atol=1e-9)


@pytest.mark.parametrize(
    "next_round",
    [
        pytest.param((device("a", fresh=True), server()), id="it restarted"),
        pytest.param((device("a", rank=3), server()), id="its rank changed"),
        pytest.param((device("a"), device("b", fresh=True), server()), id="another joined"),
        pytest.param((device("b", fresh=True), server()), id="another took its place"),
        pytest.param((device("a"), device("b", rank=0, fresh=True), server()), id="rank 0 joined"),
    ],
)
def test_a_sole_holder_gets_a_hand_back_when_it_no_longer_stands_alone(next_round):
    _, update = one_device_round()
    handed = begin(update, *next_round, round_=2)
    assert handed.replaced == {FRONT}
    expected = update[FRONT].total.delta_OI()
    for one in next_round[:-1]:
        held = handed.adapters_of(one.name)[FRONT]
        effective = held.trainable.delta_OI() + (held.frozen.delta_OI() if held.frozen else 0.0)
        np.testing.assert_allclose(effective, expected, atol=1e-5 * np.linalg.norm(expected))
    assert handed.adapters_of(SERVER) == {}


def test_a_holder_of_rank_0_carries_the_whole_update_frozen():
    _, update = one_device_round()
    handed = begin(update, device("a"), device("b", rank=0, fresh=True), server(), round_=2)
    held = handed.adapters_of("b")[FRONT]
    assert held.trainable.rank == 0
    assert held.frozen is not None
    assert held.frozen.rank == update[FRONT].total.rank


def test_rows_of_a_beyond_the_updates_rank_are_fresh_under_zero_columns_of_b():
    _, update = one_device_round()
    rank = update[FRONT].total.rank
    assert rank == 2
    pair = begin(update, device("a", rank=6), server()).adapters_of("a")[FRONT].trainable
    fresh_RI = pair.a_RI[rank:]
    assert fresh_RI.shape == (4, 8)
    assert np.all(np.abs(fresh_RI) <= 1 / np.sqrt(8))
    assert np.unique(fresh_RI).size == fresh_RI.size
    assert not pair.b_OR[:, rank:].any()
    assert pair.b_OR[:, :rank].any()


def test_fresh_rows_depend_on_seed_round_module_and_holder_and_on_nothing_else():
    def rows(*, seed=3, round_=1, name="a", module=FRONT):
        holders = (device(name, k=2, fresh=True),)
        handed = hand_back(initial(SHAPES), holders, mode="residual", seed=seed, round_=round_)
        return handed.adapters_of(name)[module].trainable.a_RI

    np.testing.assert_array_equal(rows(), rows())
    for other in (rows(seed=4), rows(round_=2), rows(name="b"), rows(module=BACK)):
        assert not np.array_equal(rows(), other)


def test_the_start_of_a_run_is_what_peft_starts_from():
    handed = begin(initial(SHAPES), device("a", fresh=True), server(fresh=True))
    held = handed.adapters_of("a")[FRONT]
    assert held.frozen is None
    assert held.trainable.a_RI.dtype == held.trainable.b_OR.dtype == np.float32
    assert held.trainable.a_RI.any()
    assert not held.trainable.b_OR.any()
    assert set(handed.adapters_of(SERVER)) == {BACK}


def test_merge_hands_the_rounds_update_to_all_and_the_whole_update_to_newcomers():
    update, deltas = initial(SHAPES), None
    holders = (device("a", fresh=True), server(fresh=True))
    for round_ in (1, 2):
        handed = hand_back(update, holders, mode="merge", seed=3, round_=round_, deltas=deltas)
        outcome = aggregate(
            handed.update,
            [contribution("a", k=1, tokens=9, adapters=trained(handed, "a", seed=round_))],
            server=trained(handed, SERVER),
            mode="merge",
            tolerance=1e-6,
        )
        update, deltas = outcome.update, outcome.deltas
        holders = (device("a"), server())
    last = hand_back(
        update, (device("a"), device("b", fresh=True), server()),
        mode="merge", seed=3, round_=3, deltas=deltas,
    )  # fmt: skip
    old, new = (last.adapters_of(name)[FRONT] for name in "ab")
    assert last.fold
    assert not old.trainable.b_OR.any()
    np.testing.assert_allclose(
        old.frozen.delta_OI(), trained(handed, "a", seed=2)[FRONT].delta_OI(), atol=1e-5
    )
    np.testing.assert_allclose(new.frozen.delta_OI(), update[FRONT].total.delta_OI(), atol=1e-5)
    assert not np.allclose(new.frozen.delta_OI(), old.frozen.delta_OI(), atol=1e-2)


def test_the_growth_of_ranks_over_rounds_is_reported():
    update = initial({FRONT: (40, 40)})
    ranks = []
    for round_ in range(1, 4):
        holders = (device("a", fresh=True), device("b", fresh=True, rank=3))
        handed = hand_back(update, holders, mode="residual", seed=3, round_=round_)
        outcome = aggregate(
            handed.update,
            [
                contribution(n, k=1, tokens=5, adapters=trained(handed, n, seed=round_))
                for n in "ab"
            ],
            server={},
            mode="residual",
            tolerance=1e-6,
        )
        update = outcome.update
        report = outcome.reports[FRONT]
        assert report.norm == pytest.approx(np.linalg.norm(update[FRONT].total.delta_OI()))
        assert outcome.largest_error <= 1e-6
        assert outcome.largest_rank == report.rank
        assert outcome.norm == pytest.approx(report.norm)
        ranks.append(report.rank)
    # At most the sum of the ranks each round; the two directions that both trained are replaced.
    assert ranks[0] == 5
    assert ranks[0] < ranks[1] < ranks[2] <= 15


def test_a_stack_with_more_rows_than_the_weight_is_not_larger_than_the_weight():
    random = np.random.default_rng(0)
    terms = [Term(random.standard_normal((4, 3)), random.standard_normal((3, 6))) for _ in range(5)]
    result = recompress(terms, shape=(4, 6), tolerance=1e-6)
    assert result.delta.rank == 4
    np.testing.assert_allclose(
        result.delta.delta_OI(), sum(t.b_OR @ t.a_RI for t in terms), atol=1e-12
    )


def test_the_tolerance_bounds_all_that_is_cut_together():
    s_R = np.diag([1.0, 0.25, 0.25])  # each alone is 0.24 of the norm, both are 0.33
    result = recompress([Term(s_R, np.eye(3))], shape=(3, 3), tolerance=0.3)
    assert result.delta.rank == 2
    assert result.relative_error == pytest.approx(0.25 / np.sqrt(1.125))


def test_terms_that_cancel_leave_nothing_but_not_noise():
    random = np.random.default_rng(0)
    term = Term(random.standard_normal((9, 3)), random.standard_normal((3, 6)))
    result = recompress([term, Term(-term.b_OR, term.a_RI)], shape=(9, 6), tolerance=0.0)
    assert result.delta.rank == 0


def pair_of(shape: tuple[int, int], rank: int = 2, fill: float = 1.0) -> LoraPair:
    return LoraPair(np.full((rank, shape[1]), fill), np.full((shape[0], rank), fill), 2.0)


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ({}, "is missing"),
        ({FRONT: pair_of((12, 8)), BACK: pair_of((12, 8))}, "not in this device's plan"),
        ({FRONT: pair_of((12, 9))}, "planned were"),
        ({FRONT: pair_of((12, 8), rank=3)}, "planned were"),
        ({FRONT: replace(pair_of((12, 8)), scaling=1.0)}, "scaling 1.0, planned was 2.0"),
        ({FRONT: pair_of((12, 8), fill=float("nan"))}, "NaN"),
        ({FRONT: pair_of((12, 8), fill=float("inf"))}, "infinity"),
    ],
)
def test_a_delivery_that_does_not_fit_the_plan_is_refused(adapters, said):
    with pytest.raises(NumericsError, match=said):
        check_adapters(adapters, holder=device("a"), update=initial(SHAPES))


def test_a_delivery_that_fits_the_plan_is_accepted_with_or_without_its_modules_of_rank_0():
    holder = replace(device("a", k=2), ranks={FRONT: 2, BACK: 0})
    fits = {FRONT: pair_of((12, 8))}
    check_adapters(fits, holder=holder, update=initial(SHAPES))
    check_adapters({**fits, BACK: pair_of((12, 8), 0)}, holder=holder, update=initial(SHAPES))


def test_what_a_holder_has_after_a_hand_back_is_what_it_trained_and_what_was_replaced():
    last = "transformer.h.2.attn.c_attn"  # held by the server alone, BACK also by device b
    modules = {BACK: 2, last: 2}
    both = Holder(
        name=SERVER, blocks=range(1, 3), ranks=modules, scalings={BACK: 1.0, last: 3.0}, fresh=False
    )
    holders = (device("a"), device("b", k=2), both)
    handed = begin(initial({**SHAPES, last: (12, 8)}), *holders)
    held, pairs = handed.adapters_of(SERVER), trained(handed, SERVER)
    outcome = aggregate(
        handed.update,
        [
            contribution("a", k=1, tokens=5, adapters=trained(handed, "a")),
            contribution("b", k=2, tokens=5, adapters=trained(handed, "b")),
        ],
        server=pairs,
        mode="residual",
        tolerance=1e-6,
    )
    handed = begin(outcome.update, *holders, round_=2)
    assert handed.replaced == {FRONT, BACK}
    after = carry_on(held, trained=pairs, replaced=handed.adapters_of(SERVER))
    assert set(after) == set(modules)
    assert after[last].trainable is pairs[last]
    for module, adapter in after.items():
        effective = adapter.trainable.delta_OI()
        if adapter.frozen is not None:
            effective = effective + adapter.frozen.delta_OI()
        expected = outcome.update[module].total.delta_OI()
        np.testing.assert_allclose(effective, expected, atol=1e-5 * np.linalg.norm(expected))


def test_what_slips_through_to_the_aggregation_is_still_refused_by_name():
    def run(adapters):
        aggregate(
            initial(SHAPES),
            [contribution("a", k=2, tokens=1, adapters=adapters)],
            server={},
            mode="residual",
            tolerance=1e-6,
        )

    with pytest.raises(NumericsError, match=r"transformer\.h\.0.*NaN"):
        run({FRONT: pair_of((12, 8), fill=float("nan"))})
    with pytest.raises(NumericsError, match=r"transformer\.h\.0.*does not belong"):
        run({FRONT: pair_of((12, 9))})
    with pytest.raises(ProtocolError, match="does not adapt"):
        run({"transformer.h.0.mlp.c_fc": pair_of((12, 8))})
    with pytest.raises(ProtocolError, match="no block"):
        block_of("lm_head")


def test_a_plan_with_a_module_outside_of_its_blocks_is_refused():
    wrong = Holder(name="a", blocks=range(1), ranks={BACK: 2}, scalings={BACK: 1.0}, fresh=True)
    with pytest.raises(PlanError, match="outside of its blocks 0 to 0"):
        begin(initial(SHAPES), wrong)
    with pytest.raises(PlanError, match="not among"):
        begin(initial({BACK: (12, 8)}), device("a", fresh=True))
    with pytest.raises(PlanError, match="one name"):
        begin(initial(SHAPES), device("a", fresh=True), device("a", fresh=True))
