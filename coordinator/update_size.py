"""How large a device's update is, in a measure in which unlike devices can be compared. Pure.

    size = √( Σ_m ‖s_m B_m A_m − S_m‖² / (s_m² r_m)  /  Σ_m out_m in_m )  /  Σ_t η_t

Symbols: B_m A_m the pair that a device delivered for module m, of rank r_m and scaling s_m; S_m
what it started the round from in its place (Frobenius norms); η_t the learning rate of step t.
Per weight, since fronts differ in length; over s √r, since so much more an equal step in every
parameter of A and B moves W; over the learning rate, since schedules rise and fall. None of
these is a device's to choose: they are of its plan, and checked.

A classifier's size is the root mean square of its weights' change, over Σ_t η_t as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from coordinator.aggregation import GlobalUpdate, ModuleUpdate
from coordinator.factoring import Term
from coordinator.handback import MEAN_MODES, Holder
from coordinator.lossy import first_directions, top
from shared.adapters import AdapterState, FactoredDelta, LoraPair
from shared.classifier_weights import ClassifierTensors
from shared.terms import HandBackMode


def adapters_size(
    adapters: AdapterState,
    *,
    holder: Holder,
    update: GlobalUpdate,
    mode: HandBackMode,
    learning_rates: float,
) -> float:
    """Return the size of what ``holder`` delivered, checked by `handback.check_adapters`.

    ``update``: the global update that the round started from; ``learning_rates``: Σ_t η_t. 0
    where the holder trains nothing.
    """
    square = weights = 0.0
    for module, pair in adapters.items():
        if holder.ranks.get(module, 0):
            start = update[module]
            change = [_term(pair), *_started_from(start, pair, mode=mode)]
            square += _square(change) / (pair.scaling**2 * pair.rank)
            weights += math.prod(start.total.shape)
    return _per_rate(square, weights, learning_rates)


def classifier_size(
    weights: ClassifierTensors, *, started_from: ClassifierTensors, learning_rates: float
) -> float:
    """Return the size of a classifier's change; ``learning_rates``: Σ_t η_t."""
    changes = [weights[n].astype(np.float64) - old for n, old in started_from.items()]
    square = sum(float(np.sum(change**2)) for change in changes)
    return _per_rate(square, sum(change.size for change in changes), learning_rates)


def _per_rate(square: float, weights: float, learning_rates: float) -> float:
    return math.sqrt(square / weights) / learning_rates if weights and learning_rates else 0.0


def _started_from(start: ModuleUpdate, pair: LoraPair, *, mode: HandBackMode) -> list[Term]:
    """Return −S of one module, as a sum.

    In `residual` S = G − F, F the rest of what was last handed back: also where the module's one
    holder went on with its pair as it was, so that nothing need be remembered of that.
    """
    if mode == "merge":
        return []
    if mode in MEAN_MODES:
        first = first_directions(start.pair, pair.rank, scaling=1.0) if start.pair else None
        return [] if first is None else [_term(first, sign=-1.0)]
    if mode == "svd" or start.handed is start.total:
        return [_delta_term(top(start.total, pair.rank), sign=-1.0)]
    handed, rank = start.handed, pair.rank
    rest = FactoredDelta(handed.u_OR[:, rank:], handed.s_R[rank:], handed.vt_RI[rank:])
    return [_delta_term(start.total, sign=-1.0), _delta_term(rest)]


def _term(pair: LoraPair, *, sign: float = 1.0) -> Term:
    return Term(sign * pair.scaling * pair.b_OR.astype(np.float64), pair.a_RI.astype(np.float64))


def _delta_term(delta: FactoredDelta, *, sign: float = 1.0) -> Term:
    return Term(sign * delta.u_OR * delta.s_R, delta.vt_RI)


def _square(terms: Sequence[Term]) -> float:
    """Return ‖Σ_k B_k A_k‖² (Frobenius) without forming the product: tr(BᵀB AAᵀ), stacked."""
    b_OR = np.concatenate([term.b_OR for term in terms], axis=1)
    a_RI = np.concatenate([term.a_RI for term in terms], axis=0)
    return max(0.0, float(np.sum((b_OR.T @ b_OR) * (a_RI @ a_RI.T))))
