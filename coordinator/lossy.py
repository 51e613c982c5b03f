"""Aggregations that lose something, as the baselines do it, and how much that is. Pure.

The exact aggregation needs none of this; these exist for comparison, and say what they lost.

    average   Ā = Σ p_i A_i         B̄ = Σ p_i s_i B_i         (FedIT, SplitLoRA, FFA-LoRA)
    zero-pad  Ā = Σ w_i [A_i; 0]    B̄ = Σ w_i s_i [B_i | 0]   (HetLoRA; to the largest rank)
    svd       the top r_i part of Σ p_i s_i B_i A_i            (HLoRA, FlexLoRA)

Symbols: p_i a participant's share of the target tokens; w_i = ‖s_i B_i A_i‖ / Σ_k ‖s_k B_k A_k‖,
HetLoRA's sparsity weights (Frobenius norms; p_i where all are zero); s_i = lora_alpha / r_i.
The product B̄ Ā of the first two has cross terms B_i A_k that nobody trained.

Shape suffixes: I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coordinator.factoring import Term, recompress
from shared.adapters import Array, FactoredDelta, LoraPair
from shared.errors import PlanError
from shared.terms import HandBackMode


class Trained(NamedTuple):
    """One participant's pair of a module, and the weight p of it. A rank of 0: it has none."""

    weight: float
    pair: LoraPair


def mean_pair(trained: Sequence[Trained], *, mode: HandBackMode) -> LoraPair:
    """Return (Ā, B̄) of `average` or `zero-pad` in float64, scalings folded into B̄.

    Raises:
        PlanError: `average`, and the pairs have different ranks.
    """
    ranks = {one.pair.rank for one in trained}
    if mode == "average" and len(ranks) != 1:
        raise PlanError(
            f"ranks {sorted(ranks)} cannot be averaged: give all devices the same rank, or use "
            "aggregation.hand_back: residual"
        )
    weights = _sparsity_weights(trained) if mode == "zero-pad" else [t.weight for t in trained]
    rank = max(ranks)
    a_RI = sum(
        w * _padded(t.pair.a_RI, rank, axis=0) for w, t in zip(weights, trained, strict=True)
    )
    b_OR = sum(
        w * t.pair.scaling * _padded(t.pair.b_OR, rank, axis=1)
        for w, t in zip(weights, trained, strict=True)
    )
    return LoraPair(np.asarray(a_RI), np.asarray(b_OR), 1.0)


def first_directions(pair: LoraPair, rank: int, *, scaling: float) -> LoraPair:
    """Return the first ``rank`` directions of a mean pair (fewer where it has fewer).

    For a holder that multiplies with ``scaling``; in float32.
    """
    return LoraPair(
        np.ascontiguousarray(pair.a_RI[:rank], dtype=np.float32),
        np.ascontiguousarray(pair.b_OR[:, :rank] * (pair.scaling / scaling), dtype=np.float32),
        scaling,
    )


def top(delta: FactoredDelta, rank: int) -> FactoredDelta:
    """Return the best approximation of this rank: the largest singular values."""
    return FactoredDelta(delta.u_OR[:, :rank], delta.s_R[:rank], delta.vt_RI[:rank])


def loss_of_pair(exact: FactoredDelta, trained: Sequence[Trained], pair: LoraPair) -> float:
    """Return what participants lose who get their first directions of ``pair``; see `_loss`."""
    return _loss(
        exact,
        [
            (one.weight, Term(pair.b_OR[:, :r], pair.a_RI[:r]))
            for one in trained
            for r in [one.pair.rank]
        ],
    )


def loss_of_svd(exact: FactoredDelta, trained: Sequence[Trained]) -> float:
    """Return what participants lose who get the top part of ``exact``; see `_loss`."""
    parts = [(one.weight, top(exact, one.pair.rank)) for one in trained]
    return _loss(exact, [(weight, Term(p.u_OR * p.s_R, p.vt_RI)) for weight, p in parts])


def _loss(exact: FactoredDelta, handed: Sequence[tuple[float, Term]]) -> float:
    """Return √(Σ p_i ‖X_i - E‖²) / ‖E‖, where participant i is handed X_i for the exact sum E.

    0 where E is zero.
    """
    if not exact.norm:
        return 0.0
    negative = Term(-exact.u_OR * exact.s_R, exact.vt_RI)
    squares = (
        weight * recompress([term, negative], shape=exact.shape, tolerance=0.0).delta.norm ** 2
        for weight, term in handed
    )
    return float(np.sqrt(sum(squares)) / exact.norm)


def _sparsity_weights(trained: Sequence[Trained]) -> list[float]:
    norms = [_norm(one.pair) for one in trained]
    total = sum(norms)
    return [norm / total for norm in norms] if total else [one.weight for one in trained]


def _norm(pair: LoraPair) -> float:
    """Return ‖s B A‖ (Frobenius) without forming the product: ‖BA‖² = tr(BᵀB AAᵀ)."""
    a_RI, b_OR = pair.a_RI.astype(np.float64), pair.b_OR.astype(np.float64)
    square = float(np.sum((b_OR.T @ b_OR) * (a_RI @ a_RI.T)))
    return abs(pair.scaling) * math.sqrt(max(0.0, square))


def _padded(factor: Array, rank: int, *, axis: int) -> Array:
    missing = rank - factor.shape[axis]
    width = [(0, missing if own == axis else 0) for own in range(2)]
    return np.pad(factor.astype(np.float64), width)
