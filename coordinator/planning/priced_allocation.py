"""Sequences and options for the devices of a large fleet, by a price on sequences. Pure.

Within a limit on its step each option of a device takes so many micro-batches at so much load on
the server. For every price that a sequence is worth, each device picks what leaves it most (price
minus load); the price is right when all sequences are placed. That is exact but for the last few
sequences (the convex hull of what each device can do), and so good for many devices.

Shape suffixes: F devices, O options of each (padded with options that are impossible), P those
of them that are of use within a limit (padded with room for nothing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from coordinator.planning.time_search import Allocation

Array: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

HALVINGS = 20
NEAR = 1.003
"""Few enough sequences too many: they are taken back where they load the server most."""
MANY = 1e9


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Offers:
    """What options cost in full micro-batches, those with the least ``load_FO`` first.

    ``option_FO``: which option it is. ``step_FO``: seconds of a step with one micro-batch, inf
    where it is impossible; ``cycle_FO`` of each more; ``load_FO``: of the server for one
    sequence. A device takes ``least_F`` to ``most_F`` sequences.
    """

    option_FO: Integers
    step_FO: Array
    cycle_FO: Array
    load_FO: Array
    micro_batch_FO: Array
    least_F: Integers
    most_F: Integers


@dataclass(frozen=True, slots=True, eq=False)
class _Useful:
    """Offers within a limit that no other beats in room and load: both grow from left to right.

    ``column_FP``: where the offer is among all; ``room_FP``: sequences that it takes.
    """

    column_FP: Integers
    room_FP: Array
    load_FP: Array


def allocate(offers: Offers, total: int, limit_s: float) -> Allocation | None:
    """Return an allocation of ``total`` sequences with little load within ``limit_s``.

    None: they cannot all be placed.
    """
    room_FO = _room(offers, limit_s)
    most_F = room_FO.max(axis=1)
    if (most_F < offers.least_F).any() or most_F.sum() < total:
        return None
    useful = _useful(offers, room_FO)
    least_F1 = offers.least_F[:, None]
    low, high = _prices(useful)
    pick_F, taken_F = useful.room_FP.argmax(axis=1), most_F
    for _ in range(HALVINGS):
        price = math.sqrt(low * high)
        picked = _pick(useful, least_F1, price=price)
        if picked[1].sum() < total:
            low = price
            continue
        high = price
        pick_F, taken_F = picked
        if taken_F.sum() <= NEAR * total:
            break
    column_F = np.take_along_axis(useful.column_FP, pick_F[:, None], axis=1)[:, 0]
    return _settled(offers, column_F, taken_F.astype(np.int64), total=total)


def _room(offers: Offers, limit_s: float) -> Array:
    """Return how many sequences each option takes within the limit; 0: not even the least."""
    if math.isinf(limit_s):
        more_FO = np.where(np.isfinite(offers.step_FO), MANY, -1.0)
    else:
        more_FO = np.floor((limit_s - offers.step_FO) / offers.cycle_FO)
    room_FO = np.clip(more_FO + 1, 0, MANY) * offers.micro_batch_FO
    room_FO = np.minimum(room_FO, offers.most_F[:, None])
    return np.where(room_FO < offers.least_F[:, None], 0.0, room_FO)


def _useful(offers: Offers, room_FO: Array) -> _Useful:
    before_FO = np.maximum.accumulate(room_FO, axis=1)
    is_useful_FO = room_FO > 0
    is_useful_FO[:, 1:] &= room_FO[:, 1:] > before_FO[:, :-1]
    place_FO = np.cumsum(is_useful_FO, axis=1) - 1
    row, column = np.nonzero(is_useful_FO)
    place = place_FO[row, column]
    shape = len(room_FO), int(place.max()) + 1
    column_FP, room_FP = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    load_FP = np.full(shape, np.inf)
    column_FP[row, place] = column
    room_FP[row, place] = room_FO[row, column]
    load_FP[row, place] = offers.load_FO[row, column]
    return _Useful(column_FP, room_FP, load_FP)


def _prices(useful: _Useful) -> tuple[float, float]:
    loads = useful.load_FP[np.isfinite(useful.load_FP)]
    return max(float(loads.min()) / 2, 1e-15), max(float(loads.max()) * 1e3, 1e-12)


def _pick(useful: _Useful, least_F1: Integers, *, price: float) -> tuple[Integers, Array]:
    """Return what each device picks of what is of use at this price, and how many it takes."""
    margin_FP = price - useful.load_FP
    taken_FP = np.where(margin_FP > 0, useful.room_FP, least_F1)
    pick_F = np.argmax(margin_FP * taken_FP, axis=1)
    return pick_F, np.take_along_axis(taken_FP, pick_F[:, None], axis=1)[:, 0]


def _settled(offers: Offers, column_F: Integers, taken_F: Integers, *, total: int) -> Allocation:
    """Take back what is too much, where it loads the server most, and say what it comes to."""
    at = np.arange(len(column_F)), column_F
    load_F, spare_F = offers.load_FO[at], taken_F - offers.least_F
    order = np.argsort(-load_F, kind="stable")
    before = np.concatenate([[0], np.cumsum(spare_F[order])[:-1]])
    taken_F = taken_F.copy()
    taken_F[order] -= np.clip(int(taken_F.sum()) - total - before, 0, spare_F[order])
    more_F = np.ceil(taken_F / offers.micro_batch_FO[at]) - 1
    seconds_F = offers.step_FO[at] + more_F * offers.cycle_FO[at]
    return Allocation(
        float(seconds_F.max()),
        float((load_F * taken_F).sum()),
        tuple(zip(offers.option_FO[at].tolist(), taken_F.tolist(), strict=True)),
    )
