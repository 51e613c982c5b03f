"""Packed tokens ↔ padded sequences.

Shape suffixes: B sequences, T longest length, N = sum(lengths) packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Where each of N packed tokens stands among B sequences padded on the right to T.

    ``positions_N`` int64: position in its sequence. ``places_N`` int64: index into the
    flattened (B·T,) padded sequences, or None where nothing is padded and both are the same.
    ``lengths_B`` int64.
    """

    sequences: int
    longest: int
    positions_N: torch.Tensor
    places_N: torch.Tensor | None
    lengths_B: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device) -> Packing:
        """Return the packing of sequences of these lengths (each at least 1)."""
        longest = max(lengths)
        lengths_B = torch.tensor(lengths, device=device)
        positions_T = torch.arange(longest, device=device)
        real_BT = positions_T < lengths_B.unsqueeze(1)
        positions_N = positions_T.expand(len(lengths), longest)[real_BT]
        places_N = None if min(lengths) == longest else real_BT.flatten().nonzero().squeeze(1)
        return cls(len(lengths), longest, positions_N, places_N, lengths_B)

    def pad(self, packed_ND: torch.Tensor) -> torch.Tensor:
        """Return (B, T, D), zero where there is no token. Differentiable."""
        shape = (self.sequences, self.longest, packed_ND.shape[1])
        if self.places_N is None:
            return packed_ND.view(shape)
        flat_SD = packed_ND.new_zeros(self.sequences * self.longest, packed_ND.shape[1])
        return flat_SD.index_copy(0, self.places_N, packed_ND).view(shape)

    def unpad(self, padded_BTD: torch.Tensor) -> torch.Tensor:
        """Return (N, D): the real tokens alone. Differentiable."""
        flat_SD = padded_BTD.reshape(-1, padded_BTD.shape[2])
        return flat_SD if self.places_N is None else flat_SD.index_select(0, self.places_N)

    def real_BT(self) -> torch.Tensor | None:
        """Return (B, T) bool, true where there is a token; None where nothing is padded."""
        if self.places_N is None:
            return None
        positions_T = torch.arange(self.longest, device=self.lengths_B.device)
        return positions_T < self.lengths_B.unsqueeze(1)

    def first_rows_B(self) -> torch.Tensor:
        """Return the index of each sequence's first token among the N packed ones."""
        return self.last_rows_B() - self.lengths_B + 1

    def last_rows_B(self) -> torch.Tensor:
        """Return the index of each sequence's last token among the N packed ones."""
        return self.lengths_B.cumsum(0) - 1
