"""Sums of low-rank products, kept factored: the linear algebra under the aggregation.

Shape suffixes: I input features, O output features, R rank of the whole stack.
Everything is accumulated in float64 and never builds the dense (O, I) matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.adapters import Array, FactoredDelta, LoraPair
from shared.errors import NumericsError


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One product ``b_OR @ a_RI`` of a sum, every weight and scaling already folded in."""

    b_OR: Array
    a_RI: Array


@dataclass(frozen=True, slots=True, eq=False)
class Recompressed:
    """A sum in its least rank, and what was cut off: ‖sum - delta‖ / ‖sum‖ (Frobenius)."""

    delta: FactoredDelta
    relative_error: float


def recompress(terms: Sequence[Term], *, shape: tuple[int, int], tolerance: float) -> Recompressed:
    """Return Σ_k B_k A_k as U S Vᵀ of the least rank within ``tolerance``.

        [B_1 | … | B_K] = Q_l R_l      [A_1; …; A_K]ᵀ = Q_r R_r      R_l R_rᵀ = X S Yᵀ
        Σ_k B_k A_k = (Q_l X) S (Q_r Y)ᵀ

    Symbols: B_k (out, r_k), A_k (r_k, in), R = Σ r_k; the core R_l R_rᵀ is
    (min(O, R), min(I, R)), so a stack of more rows than the weight has costs no more than the
    weight. The smallest singular values are cut while the relative Frobenius error stays
    within ``tolerance``; those below the rounding of the sum itself are noise and go as well
    (where terms cancel, noise is all that is left).

    Raises:
        NumericsError: a factor is not of ``shape`` (out, in), or not finite.
    """
    left_OR, right_RI = _stack(terms, shape)
    q_left, r_left = np.linalg.qr(left_OR)
    q_right, r_right = np.linalg.qr(right_RI.T)
    try:
        x, s, y_t = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise NumericsError(
            f"SVD of a {r_left.shape[0]} x {r_right.shape[0]} core did not converge; "
            "the adapters hold extreme values: lower the learning rate"
        ) from error
    size = np.linalg.norm(left_OR, axis=0) @ np.linalg.norm(right_RI, axis=1)
    rank = _least_rank(s, tolerance=tolerance, noise=float(np.finfo(np.float64).eps * size))
    delta = FactoredDelta(q_left @ x[:, :rank], s[:rank], y_t[:rank] @ q_right.T)
    whole = float(np.linalg.norm(s))
    return Recompressed(delta, float(np.linalg.norm(s[rank:])) / whole if whole else 0.0)


def split_evenly(delta: FactoredDelta, *, scaling: float = 1.0) -> LoraPair:
    """Return U S Vᵀ as a pair in float32, ``scaling`` · B A, √S in each factor.

    B = U √(S / scaling), A = √(S / scaling) Vᵀ: neither factor is large where the other is
    small, which suits both float32 and an optimizer that trains the two at one rate.
    """
    root_R = np.sqrt(delta.s_R / scaling)
    return LoraPair(
        np.ascontiguousarray(root_R[:, None] * delta.vt_RI, dtype=np.float32),
        np.ascontiguousarray(delta.u_OR * root_R, dtype=np.float32),
        scaling,
    )


def _stack(terms: Sequence[Term], shape: tuple[int, int]) -> tuple[Array, Array]:
    """Return [B_1 | … ] (O, R) and [A_1; …] (R, I) in float64, checked."""
    out_features, in_features = shape
    for term in terms:
        if term.b_OR.shape[0] != out_features or term.a_RI.shape[1] != in_features:
            raise NumericsError(
                f"an update of shape ({term.b_OR.shape[0]}, {term.a_RI.shape[1]}) does not belong "
                f"to a weight of shape {shape}"
            )
    left_OR = np.concatenate([np.zeros((out_features, 0)), *(t.b_OR for t in terms)], axis=1)
    right_RI = np.concatenate([np.zeros((0, in_features)), *(t.a_RI for t in terms)], axis=0)
    if not (np.isfinite(left_OR).all() and np.isfinite(right_RI).all()):
        raise NumericsError("an update holds NaN or infinity")
    return left_OR, right_RI


def _least_rank(s: Array, *, tolerance: float, noise: float) -> int:
    """Return how many of the descending singular values ``s`` must be kept."""
    tail = np.sqrt(np.cumsum(np.square(s[::-1])))[::-1]
    needed = np.count_nonzero(tail > tolerance * np.linalg.norm(s))
    return int(min(needed, np.count_nonzero(s > noise)))
