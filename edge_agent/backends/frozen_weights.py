"""A front's frozen weights as float32 arrays, or in 8 bits, read from verified files.

What is in 8 bits, and what is stored as float32 and wanted so, stays in the mapped file: it is
memory that the system can take back. Everything else is converted once. onnxruntime has few
kernels for half precision on a CPU, so a run whose base is in bfloat16 or float16 computes in
float32 here, with weights that have the values of that dtype.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import ModelError
from shared.int8_weights import SCALE, VALUES, Int8Weight
from shared.protocol.tensors import pack, unpack
from shared.terms import ComputeDtype
from shared.weight_files import StoredTensor, open_tensors

Array32 = npt.NDArray[np.float32]
FrozenWeight: TypeAlias = Array32 | Int8Weight

_NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I8": np.int8,
}


class FrozenWeights:
    """The tensors of some pieces, by full Hugging Face name."""

    def __init__(self, files: Iterable[Path], *, dtype: ComputeDtype) -> None:
        """Map the files; ``dtype``: that the run holds its base in.

        Raises:
            ModelError: a file is missing or damaged.
        """
        self._stored = open_tensors(dict.fromkeys(files))
        self._dtype: ComputeDtype = dtype
        self._opened: dict[Path, int] = {}

    def get(self, name: str) -> Array32:
        """Return one tensor, read-only where it is a view of its file.

        Raises:
            ModelError: it is not in the files.
        """
        return self._as_float32(_raw(self._find(name)), self._find(name).dtype)

    def int8(self, name: str) -> Int8Weight:
        """Return a weight in 8 bits, as views of its file.

        Raises:
            ModelError: it is not in the files.
        """
        values, scale = self._find(name + VALUES), self._find(name + SCALE)
        return Int8Weight(_raw(values), _raw(scale))

    def rows(self, name: str, numbers: npt.NDArray[np.int32]) -> Array32:
        """Return some rows of a matrix, read from its file: the others never come into memory.

        The file stays open from the first time on, so it may then be deleted, as mapped ones may.

        Raises:
            ModelError: it is not in the files, or they cannot be read.
        """
        stored = self._find(name)
        distinct, places = np.unique(numbers, return_inverse=True)
        raw = np.empty((len(distinct), *stored.shape[1:]), dtype=_NUMPY[stored.dtype])
        row_bytes = raw[:1].nbytes
        try:
            fd = self._descriptor(stored.file)
            for row, number in zip(raw, distinct.tolist(), strict=True):
                if os.preadv(fd, [row], stored.offset + number * row_bytes) != row_bytes:
                    raise ModelError(f"{stored.file} ends within row {number} of {name}")
        except OSError as error:
            raise ModelError(
                f"{stored.file} cannot be read ({error.strerror}): start this agent again, and "
                "what is missing is fetched"
            ) from error
        return self._as_float32(raw, stored.dtype)[places]

    def _descriptor(self, file: Path) -> int:
        if file not in self._opened:
            self._opened[file] = fd = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, fd)
        return self._opened[file]

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._stored[name]
        except KeyError:
            raise ModelError(f"weight {name} is missing from the base model's files") from None

    def _as_float32(self, raw: npt.NDArray[Any], stored: str) -> Array32:
        if stored == "BF16":
            widened = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            widened = raw.astype(np.float32, copy=False)
        if self._dtype == "float32":
            return widened
        return unpack(pack(widened, self._dtype)).astype(np.float32, copy=False)


def graph_inputs(weight: FrozenWeight, name: str) -> Mapping[str, npt.NDArray[Any]]:
    """Return what a graph takes for a weight, ``name`` inside its block; see `shared.graphs`."""
    if isinstance(weight, Int8Weight):
        return {f"weight.{name}": weight.values, f"scale.{name}": weight.scale}
    return {f"weight.{name}": weight}


def _raw(stored: StoredTensor) -> npt.NDArray[Any]:
    return np.frombuffer(stored.data, dtype=_NUMPY[stored.dtype]).reshape(stored.shape)
