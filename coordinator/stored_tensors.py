"""Tensors that lie in mapped files, as torch tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from shared.int8_weights import SCALE, VALUES
from shared.weight_files import StoredTensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}


def as_torch(stored: StoredTensor) -> torch.Tensor:
    """Return a copy of a tensor, in the dtype that it is stored in."""
    copied = torch.frombuffer(bytearray(stored.data), dtype=_DTYPES[stored.dtype])
    return copied.reshape(stored.shape)


class StoredTensors(Mapping[str, torch.Tensor]):
    """Stored tensors by full name; each access makes a copy, for the files are read-only.

    What is stored in 8 bits is found under the weight's own name, and is s q in float32 (see
    `shared.int8_weights`): what devices compute with.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        """Read nothing yet."""
        self._stored = stored
        int8 = [name.removesuffix(VALUES) for name in stored if name.endswith(VALUES)]
        parts = {name + end for name in int8 for end in (VALUES, SCALE)}
        self._names = dict.fromkeys([*(name for name in stored if name not in parts), *int8])

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        if name not in self._names:
            raise KeyError(name)
        if name in self._stored:
            return as_torch(self._stored[name])
        scale = as_torch(self._stored[name + SCALE])
        return as_torch(self._stored[name + VALUES]).float().mul_(scale)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)
