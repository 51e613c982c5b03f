"""The agent's frames in numpy are those of torch, bit for bit, errors included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.backends import numpy_wire
from shared.errors import NumericsError
from shared.modeling import wire

DTYPES = ["float32", "bfloat16", "float16"]
CPU = torch.device("cpu")
TIES = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F801000, 0x3F803000, 0x38800FFF]
SUBNORMALS = [0x00000001, 0x00008000, 0x00018000, 0x807FFFFF, 0x33000000, 0x33000001, 0x38001000]
EDGES = [0x00000000, 0x80000000, 0x477FEFFF, 0x477FF000, 0xC77FF000, 0x7F7F7FFF, 0x7F7F8000]
NOT_FINITE = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF]


def outcome(call, *arguments, **options):
    """What a call returned, or the words of its error."""
    try:
        return call(*arguments, **options)
    except NumericsError as error:
        return str(error)


def sent_and_received_alike(bits, dtype):
    array = np.array(bits, np.uint32).view(np.float32)
    ours = outcome(numpy_wire.to_frame, array, dtype=dtype, what="x")
    torchs = outcome(wire.to_frame, torch.from_numpy(array), dtype=dtype, what="x")
    if isinstance(torchs, str):
        assert ours == torchs
        return
    assert (ours.dtype, ours.shape, bytes(ours.data)) == (dtype, torchs.shape, bytes(torchs.data))
    options = {"what": "x", "dtype": dtype, "shape": array.shape}
    received = numpy_wire.from_frame(ours, **options)
    expected = wire.from_frame(torchs, **options, device=CPU).float().numpy()
    np.testing.assert_array_equal(received.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [*TIES, *SUBNORMALS, *EDGES, *NOT_FINITE])
def test_hard_numbers_are_cast_alike(bits, dtype):
    sent_and_received_alike([bits], dtype)
    sent_and_received_alike([0x3F800000] * 40 + [bits], dtype)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.sampled_from(DTYPES))
@example([], "bfloat16")
@settings(deadline=None)
def test_any_numbers_are_cast_alike(bits, dtype):
    sent_and_received_alike(bits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_numbers_are_cast_alike(dtype):
    random = np.random.default_rng(0)
    signs = random.integers(0, 2, 200_000, np.uint32) << 31
    smaller = 0x477FE000 if dtype == "float16" else 0x7F7F0000
    sent_and_received_alike(random.integers(0, smaller, 200_000, np.uint32) | signs, dtype)


@pytest.mark.parametrize("changes", [{"shape": (3,)}, {"dtype": "float16"}])
def test_what_was_not_expected_is_refused_in_the_same_words(changes):
    frame = wire.to_frame(torch.zeros(2), dtype="bfloat16", what="x")
    options = {"what": "gradient", "dtype": "bfloat16", "shape": (2,), **changes}
    ours = outcome(numpy_wire.from_frame, frame, **options)
    assert ours == outcome(wire.from_frame, frame, **options, device=CPU)
    assert ours.startswith("gradient: expected")
