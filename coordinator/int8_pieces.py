"""The pieces of blocks whose weights are held in 8 bits: computed once, and kept as files.

Only the weights of linear modules; all else in such a piece stays a view of the checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.piece_content import Tensors
from coordinator.stored_tensors import as_torch
from shared.architecture import ModelArchitecture
from shared.atomic import replace_file
from shared.errors import ModelError
from shared.int8_weights import SCALE, VALUES, Int8Weight, int8_names, quantise
from shared.weight_files import StoredTensor, header, in_file_order, open_tensors

logger = logging.getLogger(__name__)

_FORMAT = "hsplit int8 1"
"""Changed whenever the same checkpoint would come out otherwise."""


def with_int8_blocks(
    pieces: Mapping[str, Tensors],
    architecture: ModelArchitecture,
    *,
    blocks: int,
    identity: str,
    cache_folder: Path,
) -> tuple[dict[str, Tensors], Sequence[Path]]:
    """Return the pieces, the first ``blocks`` blocks' in 8 bits, and the files that these are in.

    ``identity``: another one for every other checkpoint. What is missing among the files, or cut
    short, is computed again; bytes that changed in place are not noticed, as in the checkpoint.

    Raises:
        PlanError: the model has fewer blocks.
        ModelError: a weight is not finite.
        StorageError: the cache folder cannot be written.
    """
    architecture.check_int8_blocks(blocks)
    names = set(int8_names(architecture, blocks))
    made, files = dict(pieces), []
    key = hashlib.sha256(f"{_FORMAT}\n{identity}".encode()).hexdigest()[:32]
    for block in range(blocks):
        piece = f"block.{block}"
        held = {name: t for name, t in pieces[piece].items() if name in names}
        file = cache_folder / f"int8-{key}" / f"{piece}.safetensors"
        opened = _opened(file, held)
        if opened is None:
            logger.info("quantising the weights of block %d, once", block)
            replace_file(file, _quantised(held, inputs_first=architecture.family.inputs_first))
            opened = open_tensors([file])
        rest = {name: t for name, t in pieces[piece].items() if name not in held}
        made[piece] = {**rest, **opened}
        files.append(file)
    return made, files


def _opened(file: Path, held: Tensors) -> Tensors | None:
    """Return the tensors of a file made before; None: there is none, or it is damaged."""
    if not file.exists():
        return None
    try:
        opened = open_tensors([file])
    except ModelError as error:
        logger.warning("%s: quantising again", error)
        return None
    wanted = {f"{name}{VALUES}": tensor.shape for name, tensor in held.items()}
    found = {n: t.shape for n, t in opened.items() if n.endswith(VALUES) and t.dtype == "I8"}
    return opened if found == wanted else None


def _quantised(held: Tensors, *, inputs_first: bool) -> bytes:
    """Return a safetensors file of the weights in 8 bits."""
    tensors: dict[str, StoredTensor] = {}
    for name, stored in held.items():
        weight = as_torch(stored).float().numpy()
        try:
            tensors |= _stored(name, quantise(weight, inputs_first=inputs_first), stored.file)
        except ModelError as error:
            raise ModelError(f"{stored.file}: {stored.stored_name}: {error}") from error
    ordered = in_file_order(tensors)
    return b"".join((header(ordered), *(tensor.data for tensor in ordered.values())))


def _stored(name: str, weight: Int8Weight, file: Path) -> dict[str, StoredTensor]:
    parts: dict[str, tuple[str, npt.NDArray[Any]]] = {
        VALUES: ("I8", weight.values),
        SCALE: ("F32", weight.scale),
    }
    return {
        name + end: StoredTensor(
            file, name + end, dtype, array.shape, array.reshape(-1).view(np.uint8).data
        )
        for end, (dtype, array) in parts.items()
    }
