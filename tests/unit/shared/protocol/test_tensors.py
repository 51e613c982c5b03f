"""Arrays on the wire: every dtype comes back, bfloat16 rounds as torch does, lies are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import CodecError, NumericsError
from shared.protocol.tensors import TensorFrame, expect, pack, unpack


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 3, 4)])
def test_an_array_comes_back_as_it_was(dtype, shape):
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 200).astype(dtype)
    frame = pack(array)
    assert (frame.dtype, frame.shape, frame.nbytes) == (dtype, shape, array.nbytes)
    found = unpack(frame)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_a_view_that_is_not_contiguous_is_packed_in_c_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(unpack(pack(array)), array)


def test_unpacking_copies_nothing_but_bfloat16():
    frame = pack(np.arange(4, dtype=np.float32))
    assert np.shares_memory(unpack(frame), np.frombuffer(frame.data, np.uint8))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_packing_casts_where_a_dtype_is_asked_for(dtype):
    array = np.array([[0.5, -1.25], [3.0, 0.0]], np.float64)
    frame = pack(array, dtype)
    assert frame.dtype == dtype
    np.testing.assert_array_equal(unpack(frame), array)


@given(st.integers(0, 2**32 - 1))
@example(0x3F808000)  # half-way, and the one below is even
@example(0x3F818000)  # half-way, and the one below is odd
@example(0x7F7FFFFF)  # the largest float32
@example(0x7F800001)  # a NaN whose upper half is infinity
@example(0xFFFFFFFF)
def test_bfloat16_is_the_nearest_one_ties_to_even_and_nan_stays_nan(bits):
    value = np.array([bits], np.uint32).view(np.float32)
    found = unpack(pack(value, "bfloat16"))[0]
    if np.isnan(value[0]):
        assert np.isnan(found)
        return
    low = np.array([bits & 0xFFFF0000], np.uint32)
    high = low + np.uint32(0x10000)  # the next one away from zero, infinity after the largest
    middle = (bits & 0xFFFF) - 0x8000
    odd = bool(low[0] & 0x10000)
    expected = high if middle > 0 or (middle == 0 and odd) else low
    np.testing.assert_array_equal(found, expected.view(np.float32)[0])


def test_rounding_in_chunks_is_rounding_one_by_one():
    random = np.random.default_rng(0)
    values = random.integers(0, 2**32, (3, 40_000), np.uint32).view(np.float32)
    found = unpack(pack(values, "bfloat16"))
    some = random.integers(0, values.size, 300)
    one_by_one = [unpack(pack(values.reshape(-1)[i], "bfloat16")) for i in some]
    np.testing.assert_array_equal(found.reshape(-1)[some], one_by_one)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "says"),
    [
        ("float64", (1,), bytes(8), "unknown dtype 'float64'"),
        ("float32", (1, 1, 1, 1, 1), bytes(4), "impossible shape"),
        ("float32", (-1,), b"", "impossible shape"),
        ("float32", (2,), bytes(7), r"float32\[2\] with 7 bytes"),
        ("bfloat16", (2,), bytes(8), r"bfloat16\[2\] with 8 bytes"),
    ],
)
def test_a_frame_that_contradicts_itself_cannot_be_made(dtype, shape, data, says):
    with pytest.raises(CodecError, match=says):
        TensorFrame(dtype, shape, data)


def test_what_was_expected_and_what_came_are_both_named():
    frame = pack(np.zeros((2, 3), np.float32))
    assert expect(frame, "activations", dtype="float32", shape=(2, 3)) is frame
    with pytest.raises(NumericsError, match=r"activations: expected float16\[2, 3\], got float32"):
        expect(frame, "activations", dtype="float16", shape=(2, 3))
    with pytest.raises(NumericsError, match=r"expected float32\[3, 2\], got float32\[2, 3\]"):
        expect(frame, "activations", dtype="float32", shape=(3, 2))
