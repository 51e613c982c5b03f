"""What every holder of adapters gets after an aggregation, so that all are at base + G again.

Shape suffixes: I input features, O output features, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from coordinator.aggregation import GlobalUpdate, ModuleUpdate, Sole, block_of
from coordinator.factoring import split_evenly
from coordinator.lossy import first_directions, top
from shared.adapters import (
    AdapterState,
    Array,
    FactoredDelta,
    HeldAdapters,
    LoraPair,
    ModuleAdapter,
)
from shared.errors import NumericsError, PlanError
from shared.terms import HandBackMode

MEAN_MODES: Final = frozenset({"average", "zero-pad"})
"""Modes that hand back mean factors as they are."""
WIRE_ITEM_BYTES: Final = 4
"""Factors travel in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One side of the coming round: a device, or the server (`aggregation.SERVER`).

    It holds the blocks ``blocks`` (a device: range(split layer); the server: range(smallest
    split layer, block count)). ``ranks`` and ``scalings`` (lora_alpha / rank): full module path
    → what it trains; a module it holds but does not name has rank 0. ``fresh``: it holds
    nothing of earlier hand-backs (it is new, was restarted, loads another part of the model, or
    was left out of a round), so nothing may be taken for granted.
    """

    name: str
    blocks: range
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HandBack:
    """The state that a round starts from; `adapters_of` says what one holder must be sent.

    ``update`` is the global update to aggregate on after the round. ``replaced``: the modules
    that every holder of them gets anew.
    """

    update: GlobalUpdate
    replaced: frozenset[str]
    mode: HandBackMode
    holders: Mapping[str, Holder]
    deltas: Mapping[str, FactoredDelta]
    seed: int
    round: int

    @property
    def fold(self) -> bool:
        """Whether frozen pairs are to be added to the base."""
        return self.mode == "merge"

    def ranks_of(self, name: str) -> Mapping[str, int]:
        """Return what holder ``name`` trains, by module; nothing where it takes no part."""
        return self.holders[name].ranks if name in self.holders else {}

    def adapters_of(self, name: str) -> HeldAdapters:
        """Return the modules that holder ``name`` must replace; the rest it keeps as they are.

        Made at each call, always the same, in float32. In `residual`, ``trainable`` is T_i and
        ``frozen`` F_i. In `merge`, ``trainable`` starts from zero and ``frozen`` is ΔG of the
        last round, or all of G for a fresh holder, whose base is untouched. In the other modes
        ``trainable`` is all there is: T_i in `svd`, else the first r_i directions of the mean
        factors, whose first A is the same for all. A module of rank 0 is named too (with a
        trainable pair of rank 0) where there is a frozen part to hold or something older to
        forget.
        """
        holder = self.holders[name]
        modules = (m for m in self.update if m in self.replaced and _holds(holder, m))
        adapters = {module: self._adapter(module, holder) for module in modules}
        return {
            module: adapter
            for module, adapter in adapters.items()
            if adapter.trainable.rank > 0 or adapter.frozen is not None or not holder.fresh
        }

    def bytes_to(self, name: str) -> int:
        """Return how many bytes of factors `adapters_of` has at most, without making them."""
        holder = self.holders[name]
        modules = [m for m in self.update if m in self.replaced and _holds(holder, m)]
        frozen = {module: self._frozen(module, holder) for module in modules}
        ranks = {
            module: holder.ranks.get(module, 0) + (0 if rest is None else rest.rank)
            for module, rest in frozen.items()
        }
        return self._bytes(ranks)

    def bytes_from(self, name: str) -> int:
        """Return how many bytes of factors holder ``name`` delivers after the round."""
        return self._bytes(self.holders[name].ranks)

    def _bytes(self, ranks: Mapping[str, int]) -> int:
        shapes = {module: self.update[module].total.shape for module in ranks}
        return sum(rank * sum(shapes[module]) for module, rank in ranks.items()) * WIRE_ITEM_BYTES

    def _adapter(self, module: str, holder: Holder) -> ModuleAdapter:
        rank = holder.ranks.get(module, 0)
        one = self.update[module]
        scaling = holder.scalings[module] if rank else 1.0
        frozen = self._frozen(module, holder)
        if self.fold:
            pair = split_evenly(FactoredDelta.zero(*one.total.shape), scaling=scaling)
        elif self.mode in MEAN_MODES:
            pair = _nothing(one.total.shape, scaling) if one.pair is None else one.pair
            pair = first_directions(pair, rank, scaling=scaling)
        else:
            pair = split_evenly(top(one.total, rank), scaling=scaling)
        rows_RI = self._fresh_rows(module, holder, first=pair.rank, end=rank)
        trainable = _with_fresh_rows(pair, rows_RI)
        return ModuleAdapter(trainable, split_evenly(frozen) if frozen and frozen.rank else None)

    def _frozen(self, module: str, holder: Holder) -> FactoredDelta | None:
        total = self.update[module].total
        if self.fold:
            return total if holder.fresh else self.deltas.get(module)
        return _rest(total, holder.ranks.get(module, 0)) if self.mode == "residual" else None

    def _fresh_rows(self, module: str, holder: Holder, *, first: int, end: int) -> Array:
        """Return rows ``first`` to ``end`` of A as PEFT initialises them: kaiming uniform, a = √5.

        That is U(-1/√in, 1/√in), seeded by run, round, module and holder. Where factors are
        averaged the holders must start alike, so there row j is the same for all, in all rounds.
        Of `svd` all start from one A as well: what they learn then lies in one row space, of which
        the ranks that are handed back hold more.
        """
        width = self.update[module].total.shape[1]
        name, skipped = f"{self.seed} {self.round} {module} {holder.name}", 0
        if self.mode in MEAN_MODES:
            name, skipped = f"{self.seed} {module}", first
        elif self.mode == "svd":
            name = f"{self.seed} {self.round} {module}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
        bound = 1.0 / np.sqrt(width)
        random = np.random.default_rng(seed)
        return random.uniform(-bound, bound, (skipped + end - first, width))[skipped:]


def hand_back(
    update: GlobalUpdate,
    holders: Sequence[Holder],
    *,
    mode: HandBackMode,
    seed: int,
    round_: int,
    deltas: Mapping[str, FactoredDelta] | None = None,
) -> HandBack:
    """Decide what every holder of the coming ``round_`` starts from: base + G, on all of them.

    A module is left as it is, with its optimizer moments, where its one holder had all the
    weight in the last aggregation and goes on with the same rank and scaling: it already is at
    base + G, and a run on one device then is an ordinary run (law 1). Every other module is
    replaced on all of its holders (in `residual` and `merge` without loss; the other modes give a
    holder what its rank has room for). `merge` replaces all, as the paper does. ``deltas``: of
    the last `aggregate` (`merge` only; None at the start of a program, when all are fresh).

    Raises:
        PlanError: a holder names a module that is not in ``update`` or not in its blocks, or
            two holders have one name.
    """
    by_name = {holder.name: holder for holder in holders}
    if len(by_name) != len(holders):
        raise PlanError(f"two holders have one name among {sorted(h.name for h in holders)}")
    for holder in holders:
        _check_holder(holder, update)
    kept = {m for m, old in update.items() if mode != "merge" and _undisturbed(m, old, holders)}
    renewed = {
        m: ModuleUpdate(old.total, old.total, pair=old.pair)
        for m, old in update.items()
        if m not in kept
    }
    return HandBack(
        update=MappingProxyType({m: renewed.get(m, old) for m, old in update.items()}),
        replaced=frozenset(renewed),
        mode=mode,
        holders=by_name,
        deltas=deltas or {},
        seed=seed,
        round=round_,
    )


def carry_on(held: HeldAdapters, *, trained: AdapterState, replaced: HeldAdapters) -> HeldAdapters:
    """Return all that a holder has after a hand-back, for its checkpoint.

    ``held``: what it had at the start of the round; ``trained``: its pairs at the end;
    ``replaced``: what `HandBack.adapters_of` then gave it. A fresh holder has only the last.
    """
    kept = {m: replace(one, trainable=trained.get(m, one.trainable)) for m, one in held.items()}
    return {**kept, **replaced}


def check_adapters(adapters: AdapterState, *, holder: Holder, update: GlobalUpdate) -> None:
    """Check what a device delivered against its plan, before anything is done with it.

    Modules of rank 0 may be left out.

    Raises:
        NumericsError: a module is missing or not planned, a factor or the scaling is another
            than planned, or a factor holds NaN or infinity.
    """
    missing = sorted(m for m, rank in holder.ranks.items() if rank > 0 and m not in adapters)
    if missing:
        raise NumericsError(f"the adapter of {missing[0]} is missing ({len(missing)} in all)")
    for module, pair in adapters.items():
        if module not in update or not _holds(holder, module):
            raise NumericsError(f"an adapter for {module}, which is not in this device's plan")
        _check_pair(module, pair, holder=holder, shape=update[module].total.shape)


def _check_pair(module: str, pair: LoraPair, *, holder: Holder, shape: tuple[int, int]) -> None:
    rank = holder.ranks.get(module, 0)
    planned = ((rank, shape[1]), (shape[0], rank))
    if (pair.a_RI.shape, pair.b_OR.shape) != planned:
        raise NumericsError(
            f"{module}: A {pair.a_RI.shape} and B {pair.b_OR.shape}, planned were "
            f"{planned[0]} and {planned[1]}"
        )
    if rank and pair.scaling != holder.scalings[module]:
        raise NumericsError(
            f"{module}: scaling {pair.scaling}, planned was {holder.scalings[module]}"
        )
    if not (np.isfinite(pair.a_RI).all() and np.isfinite(pair.b_OR).all()):
        raise NumericsError(f"{module}: the adapter holds NaN or infinity")


def _check_holder(holder: Holder, update: GlobalUpdate) -> None:
    for module in holder.ranks:
        if module not in update:
            raise PlanError(f"{holder.name}: {module} is not among the run's adapted modules")
        if not _holds(holder, module):
            raise PlanError(
                f"{holder.name}: {module} is outside of its blocks "
                f"{holder.blocks.start} to {holder.blocks.stop - 1}"
            )


def _holds(holder: Holder, module: str) -> bool:
    return block_of(module) in holder.blocks


def _undisturbed(module: str, old: ModuleUpdate, holders: Sequence[Holder]) -> bool:
    holding = [holder for holder in holders if _holds(holder, module)]
    if len(holding) != 1 or holding[0].fresh:
        return False
    one = holding[0]
    rank = one.ranks.get(module, 0)
    return rank > 0 and old.sole == Sole(one.name, rank, one.scalings[module])


def _rest(update: FactoredDelta, rank: int) -> FactoredDelta:
    """Return F = G - T, all but the top ``rank`` part of U S Vᵀ."""
    return FactoredDelta(update.u_OR[:, rank:], update.s_R[rank:], update.vt_RI[rank:])


def _nothing(shape: tuple[int, int], scaling: float) -> LoraPair:
    return LoraPair(np.zeros((0, shape[1])), np.zeros((shape[0], 0)), scaling)


def _with_fresh_rows(pair: LoraPair, fresh_RI: Array) -> LoraPair:
    """Return the pair with new rows of A under zero columns of B: the same product, more rank."""
    zeros = np.zeros((pair.b_OR.shape[0], fresh_RI.shape[0]), dtype=np.float32)
    return LoraPair(
        np.concatenate([pair.a_RI, fresh_RI.astype(np.float32)], axis=0),
        np.concatenate([pair.b_OR, zeros], axis=1),
        pair.scaling,
    )
