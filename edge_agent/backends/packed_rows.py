"""Packed tokens ↔ padded sequences in numpy: `shared.modeling.packing` without torch.

Shape suffixes: B sequences, T longest length, N = sum(lengths) packed tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.architecture import ModelArchitecture


class PackedRows:
    """Where each of N packed tokens stands among B sequences padded on the right to T."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        """Take the sequences' lengths, each at least 1."""
        self.lengths_B = np.array(lengths, dtype=np.int64)
        self._shape = (len(lengths), max(lengths))
        self._is_full = min(lengths) == max(lengths)
        self._real_BT = np.arange(self._shape[1]) < self.lengths_B[:, None]

    def pad(self, packed: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return (B, T, …) of (N, …), zero where there is no token."""
        shape = (*self._shape, *packed.shape[1:])
        if self._is_full:
            return packed.reshape(shape)
        padded = np.zeros(shape, dtype=packed.dtype)
        padded[self._real_BT] = packed
        return padded

    def unpad(self, padded: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return (N, …) of (B, T, …): the real tokens alone."""
        if self._is_full:
            return padded.reshape(-1, *padded.shape[2:])
        found: npt.NDArray[Any] = padded[self._real_BT]
        return found

    def last_rows_B(self) -> npt.NDArray[np.int64]:
        """Return the index of each sequence's last token among the N packed ones."""
        return np.cumsum(self.lengths_B) - 1

    def first_rows_B(self) -> npt.NDArray[np.int64]:
        """Return the index of each sequence's first token among the N packed ones."""
        return self.last_rows_B() - self.lengths_B + 1


def rows_read_by_head(
    architecture: ModelArchitecture, lengths: tuple[int, ...]
) -> npt.NDArray[np.int64] | None:
    """Return which of the N packed rows the head reads, one of each sequence; None: all."""
    if not architecture.classifies:
        return None
    rows = PackedRows(lengths)
    reads_first = architecture.family.classifier.reads == "first"
    return rows.first_rows_B() if reads_first else rows.last_rows_B()
