"""Weights in 8 bits: close to what they were, channel by channel, and the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.errors import ModelError
from shared.int8_weights import Int8Weight, quantise

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
WEIGHTS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2), elements=FLOATS)


@given(WEIGHTS)
def test_no_entry_is_off_by_more_than_half_a_step_of_its_channel(weight):
    found = quantise(weight, inputs_first=False)
    exact = found.values * found.scale.astype(np.float64)
    assert found.scale.shape == (weight.shape[0], 1)
    assert (np.abs(exact - weight) <= found.scale.astype(np.float64) * (0.5 + 1e-9)).all()


@given(WEIGHTS)
def test_the_largest_entry_of_a_channel_takes_all_of_the_range(weight):
    found = quantise(weight, inputs_first=False)
    largest = np.abs(weight).max(axis=1)
    ordinary = largest > 1e-35
    assert (np.abs(found.values[ordinary].astype(int)).max(axis=1, initial=0) == 127).all()
    assert (np.abs(found.values.astype(int)) <= 127).all()


@given(WEIGHTS)
def test_inputs_first_is_the_same_transposed(weight):
    one, other = quantise(weight, inputs_first=False), quantise(weight.T, inputs_first=True)
    np.testing.assert_array_equal(one.values, other.values.T)
    np.testing.assert_array_equal(one.scale, other.scale.T)
    np.testing.assert_array_equal(one.dequantised(), other.dequantised().T)


@given(WEIGHTS, st.integers(0, 5), FLOATS)
def test_a_channel_knows_nothing_of_the_others(weight, row, entry):
    changed = weight.copy()
    changed[row % len(weight)] = entry
    before, after = (quantise(one, inputs_first=False).dequantised() for one in (weight, changed))
    others = np.arange(len(weight)) != row % len(weight)
    np.testing.assert_array_equal(before[others], after[others])


@given(WEIGHTS)
def test_what_is_in_8_bits_already_stays_as_it_is(weight):
    first = quantise(weight, inputs_first=False).dequantised()
    again = quantise(first, inputs_first=False).dequantised()
    np.testing.assert_allclose(again, first, rtol=1e-6)


def test_a_channel_of_zeros_stays_zero():
    found = quantise(np.zeros((2, 3), np.float32), inputs_first=False)
    assert not found.values.any()
    assert (found.scale == 1).all()


@pytest.mark.parametrize("entry", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(entry):
    weight = np.ones((2, 2), np.float32)
    weight[1, 0] = entry
    with pytest.raises(ModelError, match="infinite or not a number"):
        quantise(weight, inputs_first=True)


def test_reading_it_does_not_change_it():
    weight = Int8Weight(np.array([[3, -4]], np.int8), np.array([[0.5]], np.float32))
    weight.dequantised()[:] = 0
    np.testing.assert_array_equal(weight.dequantised(), [[1.5, -2.0]])
