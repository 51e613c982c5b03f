"""Arrays ↔ frames on the wire, checked: `shared.modeling.wire` without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.protocol.tensors import (
    TensorFrame,
    expect,
    not_finite_received,
    not_finite_to_send,
    pack,
    unpack,
)
from shared.terms import WireDtype


def to_frame(array: npt.NDArray[np.float32], *, dtype: WireDtype, what: str) -> TensorFrame:
    """Return a float32 array as a frame of ``dtype``; ``what`` names it in an error.

    The frame may share memory with the array.

    Raises:
        NumericsError: it holds NaN or infinity, perhaps only after the cast to ``dtype``.
    """
    # No cast changes the order of two numbers, so what overflows shows at the extremes.
    with np.errstate(over="ignore"):
        extremes = unpack(pack(_extremes(array), dtype))
    if not np.isfinite(extremes).all():
        raise not_finite_to_send(what, dtype)
    return pack(array, dtype)


def from_frame(
    frame: TensorFrame, *, what: str, dtype: WireDtype, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Return a frame as a float32 array; ``what`` names it in an error.

    The array may share memory with ``frame.data``: do not write into it.

    Raises:
        NumericsError: another dtype or shape than expected, or NaN or infinity.
    """
    received = unpack(expect(frame, what, dtype=dtype, shape=shape))
    # A slice of a larger buffer may start anywhere.
    array = np.require(received, np.float32, ["ALIGNED"])
    if not np.isfinite(_extremes(array)).all():
        raise not_finite_received(what)
    return array


def _extremes(array: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return the least and the greatest entry, NaN if there is one; none of no entries."""
    return np.array([array.min(), array.max()] if array.size else [], dtype=np.float32)
