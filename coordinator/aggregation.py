"""Exact aggregation of adapters of any ranks, scalings and split layers, kept factored.

The coordinator calls, at every boundary between two rounds (second half in `handback`)::

    update = initial(shapes)                              # once; or that of a checkpoint
    handed = hand_back(update, holders, mode=…, seed=…, round_=1)
    …
    check_adapters(adapters, holder=…, update=handed.update)            # as they arrive
    aggregated = aggregate(handed.update, contributions, server=…, mode=…, tolerance=…)
    handed = hand_back(aggregated.update, holders, deltas=aggregated.deltas, round_=2, …)
    handed.adapters_of(device_id)         # for every device, and handed.adapters_of(SERVER)

Everything here is a pure function: no I/O, no torch, float64 throughout.

Shape suffixes: I input features, O output features, R rank.
Symbols as in the paper (arXiv:2505.02795) and ALGORITHMS: G = U S Vᵀ the global update of one
weight, p_i the weight of participant i, s_i = lora_alpha / r_i, B_i A_i its trained factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from coordinator.factoring import Recompressed, Term, recompress
from coordinator.lossy import Trained, loss_of_pair, loss_of_svd, mean_pair
from shared.adapters import AdapterState, Array, FactoredDelta, LoraPair
from shared.classifier_weights import ClassifierTensors
from shared.errors import NumericsError, PlanError, ProtocolError
from shared.terms import HandBackMode

SERVER: Final = "(server)"
"""The server's name among the holders of a module; no device id can be spelt so."""

_BLOCK = re.compile(r"\.(\d+)\.")


class Sole(NamedTuple):
    """Whose pair carried all the weight of a module: it alone *is* the global update."""

    holder: str
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class ModuleUpdate:
    """The global update of one weight.

    ``total`` is G: base + G is the model. ``handed`` is the G that the adapters now under
    training were cut from at the last hand-back; it lags behind ``total`` where a sole holder
    went on undisturbed. ``sole`` is who had all the weight in the last aggregation, if anyone.
    ``pair``: the mean factors whose product is ``total``: what `average` and `zero-pad` hand back.
    """

    total: FactoredDelta
    handed: FactoredDelta
    sole: Sole | None = None
    pair: LoraPair | None = None


GlobalUpdate: TypeAlias = Mapping[str, ModuleUpdate]
"""Full module path → its update, for every module that any holder adapts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one device did in the round.

    ``target_tokens`` over its accepted steps. ``adapters`` are the trained pairs it delivered,
    or None where it trained but was lost, or came too late, before it delivered: its tokens
    still went through the server's blocks. ``classifier``: what it delivered of one, where the
    run classifies and the device has the head (`coordinator.classifier`).
    """

    device: str
    split_layer: int
    target_tokens: int
    adapters: AdapterState | None
    classifier: ClassifierTensors = field(default_factory=dict)


class ModuleReport(NamedTuple):
    """Figures of one module after an aggregation.

    ``relative_error``: of what participants are handed back, to the exact sum; ``exact_norm``:
    that sum's Frobenius norm.
    """

    rank: int
    norm: float
    relative_error: float
    exact_norm: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aggregated:
    """The outcome: the new update, what the round added, and figures for the report.

    ``deltas`` (only of `merge`): ΔG of the round per module. ``weights``: block → holder → p,
    empty for a block that nobody trained. ``reports``: per module that was aggregated.
    """

    update: GlobalUpdate
    deltas: Mapping[str, FactoredDelta] = field(default_factory=dict)
    weights: Mapping[int, Mapping[str, float]]
    reports: Mapping[str, ModuleReport]

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole update."""
        return float(np.sqrt(sum(module.total.norm**2 for module in self.update.values())))

    @property
    def largest_rank(self) -> int:
        """The largest rank of any module's update."""
        return max((module.total.rank for module in self.update.values()), default=0)

    @property
    def largest_error(self) -> float:
        """The largest relative error of any module in this aggregation."""
        return max((report.relative_error for report in self.reports.values()), default=0.0)

    @property
    def error(self) -> float:
        """The relative error of all modules together (Frobenius)."""
        exact = sum(one.exact_norm**2 for one in self.reports.values())
        lost = sum((one.relative_error * one.exact_norm) ** 2 for one in self.reports.values())
        return float(np.sqrt(lost / exact)) if exact else 0.0


def initial(shapes: Mapping[str, tuple[int, int]]) -> GlobalUpdate:
    """Return "no update" for every module of ``shapes`` (full path → (out, in))."""
    zeros = {module: FactoredDelta.zero(*shape) for module, shape in shapes.items()}
    return MappingProxyType({module: ModuleUpdate(zero, zero) for module, zero in zeros.items()})


def block_of(module: str) -> int:
    """Return the block number in a full module path (``transformer.h.3.attn.c_attn`` → 3).

    Raises:
        ProtocolError: the path names no block.
    """
    match = _BLOCK.search(module)
    if match is None:
        raise ProtocolError(f"module {module!r} belongs to no block, so it cannot be adapted")
    return int(match.group(1))


def block_weights(contributions: Sequence[Contribution], block: int) -> Mapping[str, float]:
    """Return the weight p of every participant in one block; they sum to 1.

    A device whose front holds the block (split layer > block) and that delivered weighs its
    target tokens. The server's copy weighs the tokens of all devices that trained through it
    (split layer ≤ block), also of those lost later: their gradients are in it. Where everyone
    delivers, the sum over both is the round's token count, and this is DESIGN's formula:
    p_i = share of the tokens, 1 - Σ_{i∈C_j} p_i for the server. Participants of weight 0 are
    left out; nobody trained the block: empty.
    """
    tokens: dict[str, int] = {}
    for one in contributions:
        if one.split_layer <= block:
            tokens[SERVER] = tokens.get(SERVER, 0) + one.target_tokens
        elif one.adapters is not None:
            tokens[one.device] = one.target_tokens
    total = sum(tokens.values())
    return {name: count / total for name, count in sorted(tokens.items()) if count > 0}


def aggregate(
    update: GlobalUpdate,
    contributions: Sequence[Contribution],
    *,
    server: AdapterState,
    mode: HandBackMode,
    tolerance: float,
) -> Aggregated:
    """Return the weighted mean of all participants' effective weights, module by module.

    It is exact but in `average` and `zero-pad`, which are for comparison (see `lossy`).
    ``server`` holds the trained pairs of the server's copy. A participant without a pair for a
    module (rank 0) counts with its frozen part alone. A module of a block that nobody trained
    keeps its update. ``tolerance``: see `recompress`.

    Raises:
        NumericsError: a pair's shape is not the weight's, or it is not finite.
        PlanError: `average`, and a module's pairs have different ranks.
        ProtocolError: a pair for a module that is not part of ``update``.
    """
    pairs = {SERVER: server, **{c.device: c.adapters for c in contributions if c.adapters}}
    _check_known(update, pairs)
    weights = {b: block_weights(contributions, b) for b in {block_of(m) for m in update}}
    modules: dict[str, ModuleUpdate] = {}
    deltas: dict[str, FactoredDelta] = {}
    reports: dict[str, ModuleReport] = {}
    for module, old in update.items():
        mine = _participants(module, weights[block_of(module)], pairs)
        if not mine:
            modules[module] = ModuleUpdate(old.total, old.handed, pair=old.pair)
            continue
        try:
            new = _combine(old, mine, mode=mode, tolerance=tolerance)
            if mode == "merge":
                shape = old.total.shape
                deltas[module] = recompress(_trained(mine), shape=shape, tolerance=tolerance).delta
        except (NumericsError, PlanError) as error:
            raise type(error)(f"{module}: {error}") from error
        modules[module] = ModuleUpdate(new.delta, old.handed, _sole(mine), new.pair)
        reports[module] = new.report
    return Aggregated(
        update=MappingProxyType(modules), deltas=deltas, weights=weights, reports=reports
    )


class _Participant(NamedTuple):
    holder: str
    weight: float
    pair: LoraPair | None

    @property
    def rank(self) -> int:
        return self.pair.rank if self.pair else 0

    def pair_or_none_of(self, shape: tuple[int, int]) -> LoraPair:
        """Return the pair, or one of rank 0 of a weight of ``shape`` (out, in)."""
        return self.pair or LoraPair(np.zeros((0, shape[1])), np.zeros((shape[0], 0)), 1.0)


def _participants(
    module: str, weights: Mapping[str, float], pairs: Mapping[str, AdapterState]
) -> tuple[_Participant, ...]:
    return tuple(
        _Participant(holder, weight, pairs.get(holder, {}).get(module))
        for holder, weight in weights.items()
    )


class _Combined(NamedTuple):
    delta: FactoredDelta
    report: ModuleReport
    pair: LoraPair | None = None


def _combine(
    old: ModuleUpdate, mine: Sequence[_Participant], *, mode: HandBackMode, tolerance: float
) -> _Combined:
    """Return the new G of one module.

        residual:       G' = U diag(S_j (1 - q_j)) Vᵀ + Σ_i p_i s_i B_i A_i
        merge:          G' = U diag(S_j)           Vᵀ + Σ_i p_i s_i B_i A_i
        all others:     G' =                            Σ_i p_i s_i B_i A_i,  or B̄ Ā for it

    Symbols: U S Vᵀ the update that was last handed back, whose top r_i singular directions
    participant i trained on from; q_j = Σ p_i over participants with r_i > j (j from 0), so
    1 - q_j is the weight of those who hold direction j frozen. Residual is this project's own
    (ALGORITHMS); merge is the paper's, where everyone's base already holds the old G. In the
    others (see `lossy`) nobody holds anything but its pair.
    """
    shape = old.total.shape
    if mode == "merge":
        frozen = [_as_term(old.total, np.ones(old.total.rank))]
    elif mode == "residual":
        frozen = [_as_term(old.handed, _frozen_share(mine, old.handed.rank))]
    else:
        frozen = []
    exact = recompress([*frozen, *_trained(mine)], shape=shape, tolerance=tolerance)
    if mode in ("residual", "merge"):
        return _combined(exact.delta, exact, error=exact.relative_error)
    trained = [Trained(one.weight, one.pair_or_none_of(shape)) for one in mine]
    if mode == "svd":
        return _combined(exact.delta, exact, error=loss_of_svd(exact.delta, trained))
    pair = mean_pair(trained, mode=mode)
    product = recompress([Term(pair.b_OR, pair.a_RI)], shape=shape, tolerance=0.0)
    error = loss_of_pair(exact.delta, trained, pair)
    return _combined(product.delta, exact, error=error)._replace(pair=pair)


def _combined(delta: FactoredDelta, exact: Recompressed, *, error: float) -> _Combined:
    return _Combined(delta, ModuleReport(delta.rank, delta.norm, error, exact.delta.norm))


def _frozen_share(mine: Sequence[_Participant], rank: int) -> Array:
    """Return 1 - q (rank,), summed as such: exactly 0 where everybody trained the direction."""
    share = [sum(one.weight for one in mine if one.rank <= j) for j in range(rank)]
    return np.array(share, dtype=np.float64)


def _as_term(delta: FactoredDelta, factor_R: Array) -> Term:
    used = factor_R != 0.0
    return Term((delta.u_OR * (delta.s_R * factor_R))[:, used], delta.vt_RI[used])


def _trained(mine: Sequence[_Participant]) -> tuple[Term, ...]:
    """Return p_i s_i B_i A_i of each: weight and scaling are folded in here, nowhere else."""
    return tuple(
        Term(
            one.weight * one.pair.scaling * one.pair.b_OR.astype(np.float64),
            one.pair.a_RI.astype(np.float64),
        )
        for one in mine
        if one.pair is not None
    )


def _sole(mine: Sequence[_Participant]) -> Sole | None:
    if len(mine) != 1 or mine[0].pair is None:
        return None
    return Sole(mine[0].holder, mine[0].rank, mine[0].pair.scaling)


def _check_known(update: GlobalUpdate, pairs: Mapping[str, AdapterState]) -> None:
    for holder, adapters in pairs.items():
        unknown = sorted(adapters.keys() - update.keys())
        if unknown:
            raise ProtocolError(
                f"{holder} delivered an adapter for {unknown[0]}, which this run does not adapt"
            )
