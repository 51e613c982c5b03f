"""Averaged, padded and truncated aggregation, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.factoring import Term, recompress
from coordinator.lossy import (
    Trained,
    first_directions,
    loss_of_pair,
    loss_of_svd,
    mean_pair,
    top,
)
from shared.adapters import FactoredDelta, LoraPair
from shared.errors import PlanError

OUT, IN = 7, 5


def pair(rank: int, *, seed: int, scaling: float = 1.0) -> LoraPair:
    random = np.random.default_rng([seed, rank])
    return LoraPair(
        random.standard_normal((rank, IN)), random.standard_normal((OUT, rank)), scaling
    )


def exact(trained: list[Trained]) -> FactoredDelta:
    terms = [Term(one.weight * one.pair.scaling * one.pair.b_OR, one.pair.a_RI) for one in trained]
    return recompress(terms, shape=(OUT, IN), tolerance=0.0).delta


def dense(trained: list[Trained]) -> np.ndarray:
    return sum(one.weight * one.pair.delta_OI() for one in trained)


UNEQUAL = [
    Trained(0.5, pair(1, seed=1, scaling=4.0)),
    Trained(0.3, pair(2, seed=2, scaling=2.0)),
    Trained(0.2, pair(4, seed=3, scaling=1.0)),
]
EQUAL = [
    Trained(0.25, pair(2, seed=1, scaling=2.0)),
    Trained(0.75, pair(2, seed=2, scaling=2.0)),
]


def test_average_is_of_each_factor_apart():
    mean = mean_pair(EQUAL, mode="average")
    one, two = (trained.pair for trained in EQUAL)
    np.testing.assert_allclose(mean.a_RI, 0.25 * one.a_RI + 0.75 * two.a_RI, rtol=1e-14)
    np.testing.assert_allclose(
        mean.delta_OI(), 2.0 * (0.25 * one.b_OR + 0.75 * two.b_OR) @ mean.a_RI, rtol=1e-12
    )
    assert np.linalg.norm(mean.delta_OI() - dense(EQUAL)) > 0.1 * np.linalg.norm(dense(EQUAL))


def test_average_of_one_device_is_its_own_pair():
    alone = [Trained(1.0, pair(3, seed=5, scaling=2.0))]
    mean = mean_pair(alone, mode="average")
    back = first_directions(mean, 3, scaling=2.0)
    np.testing.assert_array_equal(back.a_RI, alone[0].pair.a_RI.astype(np.float32))
    np.testing.assert_array_equal(back.b_OR, alone[0].pair.b_OR.astype(np.float32))
    assert loss_of_pair(exact(alone), alone, mean) <= 1e-14


def test_average_with_one_a_for_all_is_exact():
    shared = pair(2, seed=9).a_RI
    same_a = [
        Trained(one.weight, LoraPair(shared, one.pair.b_OR, one.pair.scaling)) for one in EQUAL
    ]
    mean = mean_pair(same_a, mode="average")
    np.testing.assert_allclose(mean.delta_OI(), dense(same_a), rtol=1e-12, atol=1e-14)
    assert loss_of_pair(exact(same_a), same_a, mean) <= 1e-13


def test_unequal_ranks_cannot_be_averaged():
    with pytest.raises(PlanError, match=r"ranks \[1, 2, 4\] cannot be averaged.*residual"):
        mean_pair(UNEQUAL, mode="average")


def test_zero_pad_weighs_by_the_norm_of_what_was_learnt():
    norms = np.array([np.linalg.norm(one.pair.delta_OI()) for one in UNEQUAL])
    weights = norms / norms.sum()
    a_RI, b_OR = np.zeros((4, IN)), np.zeros((OUT, 4))
    for weight, (_, one) in zip(weights, UNEQUAL, strict=True):
        a_RI[: one.rank] += weight * one.a_RI
        b_OR[:, : one.rank] += weight * one.scaling * one.b_OR
    mean = mean_pair(UNEQUAL, mode="zero-pad")
    np.testing.assert_allclose(mean.a_RI, a_RI, rtol=1e-12)
    np.testing.assert_allclose(mean.b_OR, b_OR, rtol=1e-12)


def test_zero_pad_of_what_has_learnt_nothing_weighs_by_tokens():
    still = [Trained(w, LoraPair(p.a_RI, 0 * p.b_OR, p.scaling)) for w, p in UNEQUAL]
    mean = mean_pair(still, mode="zero-pad")
    np.testing.assert_allclose(mean.a_RI[3], 0.2 * UNEQUAL[2].pair.a_RI[3], rtol=1e-14)
    assert loss_of_pair(exact(still), still, mean) == 0.0


def test_a_device_gets_the_first_directions_in_its_own_scaling():
    mean = mean_pair(UNEQUAL, mode="zero-pad")
    got = first_directions(mean, 2, scaling=2.0)
    assert (got.rank, got.scaling) == (2, 2.0)
    np.testing.assert_allclose(
        got.delta_OI(), mean.b_OR[:, :2] @ mean.a_RI[:2], rtol=1e-5, atol=1e-6
    )


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_what_is_lost_is_what_dense_matrices_say(seed, ranks):
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.ones(len(ranks)))
    trained = [
        Trained(float(weight), pair(rank, seed=seed % 1000 + i, scaling=1.0 + i))
        for i, (weight, rank) in enumerate(zip(weights, ranks, strict=True))
    ]
    whole, target = dense(trained), exact(trained)
    size = float(np.linalg.norm(whole))
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    mean = mean_pair(trained, mode="zero-pad")
    cut = {rank: (u[:, :rank] * s[:rank]) @ vt[:rank] for rank in ranks}
    padded = {rank: mean.b_OR[:, :rank] @ mean.a_RI[:rank] for rank in ranks}
    for handed, found in (
        (cut, loss_of_svd(target, trained)),
        (padded, loss_of_pair(target, trained, mean)),
    ):
        squares = [w * np.linalg.norm(handed[r] - whole) ** 2 for (w, _), r in zip(trained, ranks)]  # noqa: B905
        expected = np.sqrt(sum(squares)) / size if size else 0.0
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_top_is_the_dense_svd(seed, rank):
    delta = exact([Trained(1.0, pair(5, seed=seed % 10_000))])
    u, s, vt = np.linalg.svd(delta.delta_OI(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(top(delta, rank).delta_OI(), expected, rtol=1e-6, atol=1e-9)
