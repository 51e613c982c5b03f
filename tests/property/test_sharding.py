"""However a data set is split, every record is on one device and every device has enough."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coordinator.sharding import LARGEST_ALPHA, LEAST_ALPHA, Classes, Rule, apportioned, split


@st.composite
def records(draw):
    index = draw(st.lists(st.integers(0, 6), min_size=1, max_size=200))
    return Classes(tuple("stuvwxy"), np.array(index, dtype=np.int64))


def names(count):
    return tuple(f"d{i}" for i in range(count))


@st.composite
def rules(draw, of):
    count = len(of.index_N)
    devices = draw(st.integers(1, min(12, count)))
    by = draw(st.sampled_from(["iid", "label", "size"]))
    alpha = sizes = None
    if by == "size" and draw(st.booleans()):
        size = st.floats(1e-6, 1e6)
        sizes = tuple(draw(st.lists(size, min_size=devices, max_size=devices)))
    elif by != "iid":
        alpha = 10.0 ** draw(st.floats(-9, 9))
    return Rule(
        devices=names(devices),
        by=by,
        alpha=None if alpha is None else min(max(alpha, LEAST_ALPHA), LARGEST_ALPHA),
        sizes=sizes,
        seed=draw(st.integers(-(2**70), 2**70)),
        min_records=draw(st.integers(1, count // devices)),
    )


def per_class(of, parts):
    """Return how many of each class each device has, (D, C)."""
    return np.array([np.bincount(of.index_N[part], minlength=len(of.names)) for part in parts])


@given(of=records(), data=st.data())
def test_a_split_is_a_partition_with_enough_for_everybody(of, data):
    rule = data.draw(rules(of))
    parts = split(of, rule)
    assert len(parts) == len(rule.devices)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(of.index_N)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert min(len(part) for part in parts) >= rule.min_records


@given(of=records(), data=st.data())
def test_the_same_seed_makes_the_same_split(of, data):
    rule = data.draw(rules(of))
    for one, other in zip(split(of, rule), split(of, rule), strict=True):
        np.testing.assert_array_equal(one, other)


@given(of=records(), devices=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_with_a_large_alpha_every_device_has_its_share_of_every_class(of, devices, seed):
    devices = min(devices, len(of.index_N))
    rule = Rule(devices=names(devices), by="label", alpha=LARGEST_ALPHA, seed=seed)
    counts_DC = per_class(of, split(of, rule))
    # Rounding: less than 1 each; nobody empty: up to one more for each device that was.
    given_away = devices - np.count_nonzero(counts_DC.sum(axis=1) > 1)
    assert np.abs(counts_DC - counts_DC.sum(axis=0) / devices).max() < 1.01 + given_away


@given(of=records(), devices=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_with_a_small_alpha_every_class_is_on_one_device(of, devices, seed):
    devices = min(devices, len(of.index_N))
    rule = Rule(devices=names(devices), by="label", alpha=LEAST_ALPHA, seed=seed)
    counts_DC = per_class(of, split(of, rule))
    elsewhere = (counts_DC.sum(axis=0) - counts_DC.max(axis=0)).sum()
    assert elsewhere <= devices - 1, "no more than what nobody-is-empty asks for"


@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=50).filter(lambda some: sum(some) > 1e-6),
    total=st.integers(0, 10**9),
)
def test_whole_numbers_add_up_and_are_off_by_less_than_one(shares, total):
    shares_D = np.array(shares) / sum(shares)
    counts_D = apportioned(shares_D, total)
    assert counts_D.sum() == total
    assert np.abs(counts_D - shares_D * total).max() < 1 + 1e-5
