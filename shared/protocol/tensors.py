"""Tensors on the wire: a dtype name, a shape and raw little-endian bytes.

numpy has no bfloat16, so `pack` and `unpack` convert it by its bits. Programs with torch
convert there (`shared.modeling.wire`); the bytes are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import CodecError, NumericsError
from shared.terms import WireDtype

Buffer: TypeAlias = bytes | bytearray | memoryview

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "uint8": 1}
MAX_DIMENSIONS = 4
MAX_ITEMS = 2**40
"""Also of a tensor of no items, its zeros left out: numpy multiplies the other dimensions, too."""

_CHUNK = 32_768
"""Items rounded at a time: the bits in between stay in a core's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorFrame:
    """One tensor as it travels: ``data`` holds prod(shape) items of ``dtype``, C order.

    Raises:
        CodecError: unknown dtype, a shape of more than 4 dimensions, with a negative or a far
            too long one, or a number of bytes that is not the shape's.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Buffer

    def __post_init__(self) -> None:
        """Check that dtype, shape and number of bytes belong together."""
        item = ITEM_BYTES.get(self.dtype)
        if item is None:
            raise CodecError(f"tensor of unknown dtype {self.dtype!r}")
        impossible = len(self.shape) > MAX_DIMENSIONS or any(n < 0 for n in self.shape)
        if impossible or math.prod(n or 1 for n in self.shape) > MAX_ITEMS:
            raise CodecError(f"tensor of impossible shape {self.shape}")
        if memoryview(self.data).nbytes != math.prod(self.shape) * item:
            raise CodecError(
                f"tensor {self.dtype}{list(self.shape)} with {memoryview(self.data).nbytes} bytes"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the raw data."""
        return memoryview(self.data).nbytes


def expect(frame: TensorFrame, what: str, *, dtype: str, shape: tuple[int, ...]) -> TensorFrame:
    """Return ``frame`` if it has this dtype and shape; say what was wrong otherwise.

    Raises:
        NumericsError: naming ``what``, the expected and the received dtype and shape.
    """
    if frame.dtype != dtype or frame.shape != shape:
        raise NumericsError(
            f"{what}: expected {dtype}{list(shape)}, got {frame.dtype}{list(frame.shape)}"
        )
    return frame


def not_finite_to_send(what: str, dtype: str) -> NumericsError:
    """Return the error of a tensor that holds NaN or infinity, perhaps only as ``dtype``."""
    advice = "use wire_dtype bfloat16 or float32" if dtype == "float16" else "training diverged"
    return NumericsError(f"{what}: NaN or infinity in {dtype} ({advice})")


def not_finite_received(what: str) -> NumericsError:
    """Return the error of a received tensor that holds NaN or infinity."""
    return NumericsError(f"{what}: NaN or infinity received; it was not used")


def pack(array: npt.NDArray[Any], dtype: WireDtype | None = None) -> TensorFrame:
    """Return a float, int32 or uint8 array as a frame, cast to ``dtype`` (floats only) if given."""
    if dtype == "bfloat16":
        return TensorFrame("bfloat16", array.shape, _bytes(_to_bfloat16_bits(array)))
    if dtype is not None:
        array = array.astype(dtype, copy=False)
    return TensorFrame(str(array.dtype), array.shape, _bytes(array))


def unpack(frame: TensorFrame) -> npt.NDArray[Any]:
    """Return the frame as an array; bfloat16 comes back as float32, all else without a copy."""
    if frame.dtype == "bfloat16":
        bits = np.frombuffer(frame.data, dtype="<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32).reshape(frame.shape)
    return np.frombuffer(frame.data, dtype=frame.dtype).reshape(frame.shape)


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data if flat.size else memoryview(b"")


def _to_bfloat16_bits(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(array, dtype=np.float32).reshape(-1)
    bits = values.view(np.uint32)
    rounded = np.empty(bits.size, np.uint16)
    scratch = np.empty(min(bits.size, _CHUNK), np.uint32)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        sums = scratch[: chunk.size]
        np.right_shift(chunk, 16, out=sums)
        sums &= 1
        sums += 0x7FFF
        sums += chunk
        np.right_shift(sums, 16, out=rounded[start : start + _CHUNK], casting="unsafe")
    if values.size and np.isnan(values.max()):  # the greatest, where there is one
        rounded[np.isnan(values)] = 0x7FC0
    return rounded.reshape(array.shape)
