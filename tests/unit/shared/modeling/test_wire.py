"""Tensors to frames and back, with every check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.errors import NumericsError
from shared.modeling.wire import DTYPES, from_frame, to_frame
from shared.protocol.tensors import TensorFrame, pack, unpack

CPU = torch.device("cpu")


def received(frame, **changes):
    expected = {"what": "x", "dtype": frame.dtype, "shape": frame.shape, "device": CPU}
    return from_frame(frame, **{**expected, **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(5, 3), (0, 3)])
def test_a_tensor_survives_the_wire(dtype, shape):
    tensor = torch.randn(shape)
    back = received(to_frame(tensor, dtype=dtype, what="x"))
    assert back.dtype == DTYPES[dtype]
    assert torch.equal(back, tensor.to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_are_those_of_the_torch_free_side(dtype):
    tensor = torch.randn(7, 4)
    frame = to_frame(tensor, dtype=dtype, what="x")
    assert bytes(frame.data) == bytes(pack(tensor.numpy(), dtype).data)
    np.testing.assert_array_equal(unpack(frame), tensor.to(DTYPES[dtype]).float().numpy())


def unaligned(data):
    return memoryview(bytearray(b"-" + data))[1:]


@pytest.mark.parametrize("buffer", [bytes, bytearray, lambda b: memoryview(bytes(b)), unaligned])
def test_every_kind_of_buffer_is_read_alike(buffer):
    frame = to_frame(torch.randn(2, 3), dtype="bfloat16", what="x")
    copied = TensorFrame(frame.dtype, frame.shape, buffer(bytes(frame.data)))
    assert torch.equal(received(copied), received(frame))


def test_a_transposed_tensor_is_sent_in_c_order():
    tensor = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(received(to_frame(tensor, dtype="float32", what="x")), tensor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_neither_sent_nor_taken(bad):
    tensor = torch.tensor([[1.0, bad]])
    with pytest.raises(NumericsError, match="activations: NaN or infinity"):
        to_frame(tensor, dtype="float32", what="activations")
    with pytest.raises(NumericsError, match="x: NaN or infinity"):
        received(pack(tensor.numpy()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_is_found_wherever_it_stands(dtype):
    for position in range(100):
        tensor = torch.zeros(100)
        tensor[position] = float("nan")
        with pytest.raises(NumericsError, match="NaN or infinity"):
            to_frame(tensor, dtype=dtype, what="x")
        with pytest.raises(NumericsError, match="NaN or infinity received"):
            received(pack(tensor.numpy(), dtype))


def test_overflow_in_float16_advises_bfloat16():
    with pytest.raises(NumericsError, match="bfloat16"):
        to_frame(torch.tensor([1e6]), dtype="float16", what="x")


@pytest.mark.parametrize("changes", [{"shape": (2, 4)}, {"shape": (6,)}, {"dtype": "bfloat16"}])
def test_another_shape_or_dtype_is_refused(changes):
    frame = to_frame(torch.zeros(2, 3), dtype="float32", what="x")
    with pytest.raises(NumericsError, match=r"expected .* got float32\[2, 3\]"):
        received(frame, **changes)
