"""Which device gets which record of a data set that is to be split: a function of seed and rule.

Three ways: ``iid`` (equal parts of shuffled records), ``label`` (unequal mixtures of classes) and
``size`` (unequal parts of the same mixture). The unequal ones draw shares over the D devices,

    p ~ Dirichlet(α, …, α),      α → ∞: equal shares,      α → 0: one device has all

``label`` once for every class (Yurochkin et al., arXiv:1905.12022), ``size`` once in all. Shares
become whole records by largest remainders, so that every record has one owner. *Ours*: where the
literature draws again until nobody has too little, which may never end, a device below
``min_records`` is filled up with records of whoever has the most.

Shape suffixes: N records, D devices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, DataError

By: TypeAlias = Literal["iid", "label", "size"]
Indices: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

DEFAULT_ALPHA = 0.5
LEAST_ALPHA, LARGEST_ALPHA = 1e-9, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How to split. ``sizes``: stated proportions, one a device, in place of a draw.

    ``alpha`` is the concentration of the draws; None for the usual 0.5.

    Raises:
        ConfigError: a value makes no sense, or two of them together.
    """

    devices: tuple[str, ...]
    by: By
    alpha: float | None = None
    sizes: tuple[float, ...] | None = None
    seed: int = 0
    min_records: int = 1

    def __post_init__(self) -> None:
        if not self.devices or len(set(self.devices)) < len(self.devices):
            raise ConfigError("devices: name at least one, and each one once")
        if self.min_records < 1:
            raise ConfigError(f"min-records {self.min_records}: must be 1 or more")
        if self.sizes is not None:
            self._check_sizes(self.sizes)
        if self.alpha is not None:
            self._check_alpha(self.alpha)

    @property
    def is_drawn(self) -> bool:
        """Whether shares are drawn: those of ``iid`` and stated sizes are not."""
        return self.by != "iid" and self.sizes is None

    @property
    def concentration(self) -> float:
        """The α of the draws."""
        return DEFAULT_ALPHA if self.alpha is None else self.alpha

    def _check_alpha(self, alpha: float) -> None:
        if not self.is_drawn:
            raise ConfigError(
                "alpha: goes with a split by label, or by size without stated sizes; leave it out"
            )
        if not LEAST_ALPHA <= alpha <= LARGEST_ALPHA:  # NaN is refused, too
            raise ConfigError(
                f"alpha {alpha:g}: must be above 0, from {LEAST_ALPHA:g} (all of a class on one "
                f"device) to {LARGEST_ALPHA:g} (all devices alike)"
            )

    def _check_sizes(self, sizes: Sequence[float]) -> None:
        if self.by != "size":
            raise ConfigError(f"sizes: these go with a split by size, not by {self.by}")
        if len(sizes) != len(self.devices):
            raise ConfigError(
                f"sizes: {len(sizes)} are stated for {len(self.devices)} devices; state one each"
            )
        if not all(0 < size <= 1e15 for size in sizes):
            raise ConfigError("sizes: each must be a number above 0; they are proportions")


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """The class of every record: ``index_N`` int64 into ``names``, which differ."""

    names: tuple[str, ...]
    index_N: Indices


def split(classes: Classes, rule: Rule) -> tuple[Indices, ...]:
    """Return each device's records, as ascending indices; every record is on one device.

    A function of the arguments alone, whatever the version of numpy.

    Raises:
        DataError: there are fewer than ``min_records`` for each device.
    """
    count, devices = len(classes.index_N), len(rule.devices)
    if count < devices * rule.min_records:
        raise DataError(
            f"{count} records are too few for {devices} devices with {rule.min_records} or more "
            "each; name fewer devices, or ask for fewer records each"
        )
    order_N = _shuffled(count, rule.seed)
    owner_N = np.empty(count, dtype=np.int64)
    for name, members in _groups(classes, order_N, rule):
        counts_D = apportioned(_shares(rule, name), len(members))
        owner_N[members] = np.repeat(np.arange(devices), counts_D)
    _fill_up(owner_N, order_N, rule)
    return _by_index(owner_N, devices)


def apportioned(shares_D: Floats, total: int) -> Indices:
    """Return whole numbers with the sum ``total``, in proportion to shares with the sum 1.

    By largest remainders: each differs from its exact value by less than 1.
    """
    exact_D = shares_D * total
    counts_D = np.floor(exact_D).astype(np.int64)
    largest_first = np.argsort(counts_D - exact_D, kind="stable")
    counts_D[largest_first[: total - counts_D.sum()]] += 1
    return counts_D


def _groups(classes: Classes, order_N: Indices, rule: Rule) -> list[tuple[str, Indices]]:
    """Return what is divided at one go: each class, shuffled, or all records."""
    if rule.by != "label":
        return [("", order_N)]
    return list(
        zip(classes.names, _by_index(classes.index_N, len(classes.names), order_N), strict=True)
    )


def _shares(rule: Rule, name: str) -> Floats:
    """Return the devices' shares (D,) of a group; the sum is 1."""
    if rule.sizes is not None:
        shares_D = np.array(rule.sizes, dtype=np.float64)
    elif rule.by == "iid":
        shares_D = np.ones(len(rule.devices))
    else:
        # Gamma(α + 1) U^(1/α) is Gamma(α). As logarithms: with a small α most of them underflow.
        draws = _draws(rule.seed, f"shares/{name}")
        gamma_D = draws.standard_gamma(rule.concentration + 1, size=len(rule.devices))
        uniform_D = 1 - draws.random_sample(len(rule.devices))  # in (0, 1]
        logs_D = np.log(gamma_D) + np.log(uniform_D) / rule.concentration
        shares_D = np.exp(logs_D - logs_D.max())
    return shares_D / math.fsum(shares_D)


def _fill_up(owner_N: Indices, order_N: Indices, rule: Rule) -> None:
    """Give records to those who have too few, one by one from whoever has the most then."""
    counts_D = np.bincount(owner_N, minlength=len(rule.devices))
    if counts_D.min() >= rule.min_records:
        return
    # A random record of the giver, whose mixture of classes so stays what it was.
    left = [list(part) for part in _by_index(owner_N, len(rule.devices), order_N)]
    for taker in np.flatnonzero(counts_D < rule.min_records):
        while counts_D[taker] < rule.min_records:
            giver = int(counts_D.argmax())
            owner_N[left[giver].pop()] = taker
            counts_D[giver] -= 1
            counts_D[taker] += 1


def _by_index(index_N: Indices, count: int, order_N: Indices | None = None) -> tuple[Indices, ...]:
    """Return the records of each index from 0 to ``count`` - 1, in the order that is given."""
    order_N = np.arange(len(index_N)) if order_N is None else order_N
    sorted_N = order_N[np.argsort(index_N[order_N], kind="stable")]
    ends = np.cumsum(np.bincount(index_N, minlength=count))
    return tuple(np.split(sorted_N, ends[:-1]))


def _shuffled(count: int, seed: int) -> Indices:
    return np.argsort(_philox(seed, "order").random_raw(count), kind="stable")


def _draws(seed: int, what: str) -> np.random.RandomState:
    # Its draws never change with numpy's version; those of `Generator` may.
    return np.random.RandomState(_philox(seed, what))


def _philox(seed: int, what: str) -> np.random.Philox:
    key = hashlib.sha256(f"{seed}/{what}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little"))
