"""Arrays to frames and back without torch, with every check."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.backends.numpy_wire import from_frame, to_frame
from shared.errors import NumericsError
from shared.protocol.tensors import TensorFrame, pack

DTYPES = ["float32", "bfloat16", "float16"]


def received(frame, **changes):
    return from_frame(frame, **{"what": "x", "dtype": frame.dtype, "shape": frame.shape, **changes})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (0, 3), ()])
def test_an_array_survives_the_wire(dtype, shape):
    array = np.asarray(np.random.default_rng(0).integers(-8, 8, shape) / 4, np.float32)
    back = received(to_frame(array, dtype=dtype, what="x"))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, array, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_a_larger_buffer_is_read_into_aligned_memory(dtype):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    frame = to_frame(array, dtype=dtype, what="x")
    unaligned = memoryview(bytearray(b"-" + bytes(frame.data)))[1:]
    back = received(TensorFrame(frame.dtype, frame.shape, unaligned))
    assert back.flags.aligned
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_neither_sent_nor_taken(dtype, bad):
    for position in range(40):
        array = np.ones((5, 8), np.float32)
        array.reshape(-1)[position] = bad
        with pytest.raises(NumericsError, match=f"activations: NaN or infinity in {dtype}"):
            to_frame(array, dtype=dtype, what="activations")
        with pytest.raises(NumericsError, match="x: NaN or infinity received; it was not used"):
            received(pack(array, dtype))


@pytest.mark.parametrize(
    ("dtype", "value", "advice"),
    [
        ("float16", 65520.0, "use wire_dtype bfloat16 or float32"),
        ("float16", -1e6, "use wire_dtype bfloat16 or float32"),
        ("bfloat16", 3.4e38, "training diverged"),
    ],
)
def test_what_overflows_in_the_cast_is_not_sent(dtype, value, advice):
    with pytest.raises(NumericsError, match=f"x: NaN or infinity in {dtype} .{advice}"):
        to_frame(np.array([1.0, value], np.float32), dtype=dtype, what="x")


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65519.0), ("bfloat16", 3.39e38)])
def test_what_rounds_down_to_the_largest_number_is_sent(dtype, value):
    frame = to_frame(np.array([value, -value], np.float32), dtype=dtype, what="x")
    assert np.isfinite(received(frame)).all()


@pytest.mark.parametrize("changes", [{"shape": (2, 4)}, {"shape": (6,)}, {"dtype": "bfloat16"}])
def test_another_shape_or_dtype_is_refused(changes):
    frame = to_frame(np.zeros((2, 3), np.float32), dtype="float32", what="x")
    with pytest.raises(NumericsError, match=r"x: expected .* got float32\[2, 3\]"):
        received(frame, **changes)
