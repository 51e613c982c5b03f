"""The masks of LoRA's dropout, drawn by numpy and handed to the graphs as inputs.

Shape suffixes: M rows, I input features.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_LEVELS = 2**16
"""An entry is kept or not by 16 random bits: numpy's float32 ones take three times as long."""


class DropoutMasks:
    """One mask for each (micro-batch, module): a function of its arguments, so nothing is kept.

    Not torch's masks, as these are not its random numbers: only of the same distribution, but
    that the probability is rounded to a multiple of 1/65536. The mean of an entry is 1.
    """

    def __init__(self, probability: float) -> None:
        """Drop entries with this probability, which is below 1."""
        self._kept_levels = max(1, round((1.0 - probability) * _LEVELS))

    def mask_MI(self, seed: int, module: str, *, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Return what to multiply a module's input by: 1 / keep, or 0 where it is dropped.

        ``seed`` is the micro-batch's (`shared.dropout_seed`).
        """
        key = hashlib.sha256(f"{seed}/{module}".encode()).digest()[:16]
        source = np.random.Philox(key=int.from_bytes(key, "little"))
        rows, columns = shape
        draws = source.random_raw(-(-rows * columns // 4)).view(np.uint16)[: rows * columns]
        mask_MI = np.empty(shape, np.float32)
        np.less(draws.reshape(shape), self._kept_levels, out=mask_MI)
        mask_MI *= _LEVELS / self._kept_levels
        return mask_MI
