"""Sequences and options for the devices of a small fleet: exact, by dynamic programming. Pure.

Shape suffixes: O options of one device, Y numbers of sequences it may take, X sequences beyond
the least that each device takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from coordinator.planning.time_search import Allocation

Array: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What each option costs with ``least``, ``least`` + 1 … sequences.

    ``seconds_OY`` of the device's own step, ``load_OY`` of the server's work for it.
    """

    least: int
    seconds_OY: Array
    load_OY: Array


def allocate(tables: Sequence[Table], total: int, limit_s: float) -> Allocation | None:
    """Return the allocation of ``total`` sequences with the least load within ``limit_s``.

    None: they cannot all be placed.
    """
    extra = total - sum(table.least for table in tables)
    if extra < 0:
        return None
    load_X = np.full(extra + 1, np.inf)
    load_X[0] = 0.0
    taken: list[Indices] = []
    options: list[Indices] = []
    for table in tables:
        allowed_OY = np.where(table.seconds_OY <= limit_s, table.load_OY, np.inf)
        options.append(np.argmin(allowed_OY, axis=0))
        load_X, took_X = _join(load_X, np.min(allowed_OY, axis=0))
        taken.append(took_X)
    if not np.isfinite(load_X[extra]):
        return None
    return _read(tables, taken, options, extra=extra)


def _join(before_X: Array, own_Y: Array) -> tuple[Array, Indices]:
    """Return the least load of one more device, and what it takes, by sequences placed so far."""
    best_X = np.full_like(before_X, np.inf)
    took_X = np.zeros(len(before_X), dtype=np.int64)
    for taken, load in itertools.islice(enumerate(own_Y), len(before_X)):
        if not np.isfinite(load):
            continue
        sum_X = before_X[: len(before_X) - taken] + load
        better = sum_X < best_X[taken:]
        best_X[taken:][better] = sum_X[better]
        took_X[taken:][better] = taken
    return best_X, took_X


def _read(
    tables: Sequence[Table], taken: Sequence[Indices], options: Sequence[Indices], *, extra: int
) -> Allocation:
    choices: list[tuple[int, int]] = []
    longest_s, server_s = 0.0, 0.0
    for table, took_X, option_Y in reversed(list(zip(tables, taken, options, strict=True))):
        own = int(took_X[extra])
        option = int(option_Y[own])
        choices.append((option, table.least + own))
        longest_s = max(longest_s, float(table.seconds_OY[option, own]))
        server_s += float(table.load_OY[option, own])
        extra -= own
    return Allocation(longest_s, server_s, tuple(reversed(choices)))
