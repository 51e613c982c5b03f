"""Frozen weights of linear modules in 8 bits: a whole number per entry, a scale per output channel.

    W_oi ≈ s_o q_oi        s_o = max_i |W_oi| / 127,   q_oi = round(W_oi / s_o) in -127 … 127

so no entry is off by more than s_o / 2. Where a run says `training.int8_blocks`, this product is
what *everybody* takes for the weight: a device that holds q and s, one that holds s q in
float32, and the server.

In a piece such a weight has not its own name but two others, so that a program which knows nothing
of this misses a tensor instead of taking whole numbers for weights.

Shape suffixes: I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.architecture import ModelArchitecture
from shared.errors import ModelError

VALUES = ".int8"
"""Ends the name of q, which has the shape of the weight."""
SCALE = ".scale"
"""Ends the name of s, which is (O, 1), or (1, O) where the weight is (I, O): it multiplies q as
it is."""

_LARGEST = 127
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """q and s of one weight."""

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def size(self) -> int:
        """How many entries the weight has."""
        return self.values.size

    def dequantised(self) -> npt.NDArray[np.float32]:
        """Return s q, float32: the same on every machine."""
        weight = self.values.astype(np.float32)
        weight *= self.scale
        return weight


def quantise(weight: npt.NDArray[np.float32], *, inputs_first: bool) -> Int8Weight:
    """Return the weight in 8 bits; it is (I, O) with ``inputs_first``, else (O, I).

    A channel in which nothing is as large as the smallest normal number becomes zero.

    Raises:
        ModelError: an entry is not finite.
    """
    largest = np.abs(weight).max(axis=0 if inputs_first else 1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ModelError("a weight is infinite or not a number")
    scale = (largest / np.float32(_LARGEST)).astype(np.float32)
    scale[scale < _TINY] = 1.0
    # In float64, where no quotient is rounded across the half: the bound above holds to the letter.
    values = np.rint(weight / scale.astype(np.float64))
    return Int8Weight(values.astype(np.int8), scale)


def int8_names(architecture: ModelArchitecture, blocks: int) -> tuple[str, ...]:
    """Return the full names of the weights that are held in 8 bits, in the first ``blocks``."""
    return tuple(
        f"{architecture.block_path(block)}.{inside}.weight"
        for block in range(blocks)
        for inside in architecture.linears
    )
