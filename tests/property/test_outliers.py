"""Laws of refusing updates: independent of order and unit, bounded, and a majority stands."""

from __future__ import annotations

import math

from hypothesis import assume, given
from hypothesis import strategies as st

from coordinator.outliers import LEAST_VALUES, limit, outliers

SIZES = st.floats(1e-9, 1e9)
FACTORS = st.floats(0.5, 100)
ROUNDS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), SIZES, max_size=9)
BEFORE = st.lists(SIZES, max_size=9)


@given(ROUNDS, BEFORE, FACTORS, st.randoms())
def test_order_of_arrival_changes_nothing(sizes, before, factor, random):
    devices = list(sizes)
    random.shuffle(devices)
    shuffled = {device: sizes[device] for device in devices}
    assert outliers(shuffled, before, factor=factor) == outliers(sizes, before, factor=factor)


@given(ROUNDS, BEFORE, FACTORS, st.integers(-20, 20))
def test_the_unit_changes_nothing(sizes, before, factor, exponent):
    scaled = {device: math.ldexp(size, exponent) for device, size in sizes.items()}
    refused = outliers(scaled, [math.ldexp(size, exponent) for size in before], factor=factor)
    assert refused.keys() == outliers(sizes, before, factor=factor).keys()


@given(ROUNDS, BEFORE, FACTORS)
def test_at_least_half_of_a_round_is_accepted(sizes, before, factor):
    refused = outliers(sizes, before, factor=factor)
    assert 2 * len(refused) <= len(sizes)
    assert all(sizes[device] > min(sizes.values()) for device in refused)


@given(st.lists(SIZES, min_size=LEAST_VALUES, max_size=15), FACTORS)
def test_the_limit_lies_within_known_multiples_of_the_median(sizes, factor):
    median = sorted(sizes)[len(sizes) // 2] if len(sizes) % 2 else None
    assume(median)
    most = limit(sizes, factor=factor)
    assert median * (1 + 0.5 * factor) * 0.999 <= most <= median * (1 + 1.4826 * factor) * 1.001


@given(
    st.lists(st.floats(1.0, 2.0), min_size=3, max_size=9),
    st.lists(st.floats(100.0, 1e12), min_size=1, max_size=4),
)
def test_a_minority_of_crude_poisoners_is_refused_and_nobody_else(honest, poison):
    assume(len(poison) < len(honest))
    sizes = {
        **{f"honest-{i}": size for i, size in enumerate(honest)},
        **{f"poison-{i}": size for i, size in enumerate(poison)},
    }
    refused = outliers(sizes, [], factor=10.0)
    assert set(refused) == {f"poison-{i}" for i in range(len(poison))}
