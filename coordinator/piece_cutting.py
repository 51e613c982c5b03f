"""Cutting a checkpoint into pieces: which tensor goes where, under which name and hash.

Checkpoints differ in what they call a tensor (GPT-2's on the hub lack ``transformer.``) and in
what else they store (masks, rotary tables, the tied output projection a second time). Pieces
hold exactly the parameters of the Hugging Face model of the run's task, under its names.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.piece_content import PieceContent, Tensors
from shared.architecture import ModelArchitecture
from shared.atomic import replace_file
from shared.errors import ModelError, StorageError
from shared.modeling.skeleton import empty_model
from shared.protocol.messages import Piece
from shared.weight_files import ITEM_BYTES, StoredTensor

logger = logging.getLogger(__name__)

_FORMAT = "hsplit pieces 1"
"""Changed whenever the bytes of a piece would come out otherwise."""


def cut(
    stored: Tensors, architecture: ModelArchitecture, *, config: Mapping[str, Any]
) -> dict[str, Tensors]:
    """Return piece name → tensors of the piece, by full Hugging Face name.

    Raises:
        ModelError: a tensor is missing, has another shape than ``config`` says or a quantised
            dtype, or the output projection differs from the embeddings it is tied to.
    """
    named = _named(stored, architecture)
    shapes = _shapes(architecture, config)
    _check(named, shapes)
    _check_tied(named, architecture)
    pieces: dict[str, dict[str, StoredTensor]] = {}
    for name in shapes:
        piece = architecture.piece_of(name)
        if piece is not None:
            pieces.setdefault(piece, {})[name] = named[name]
    return dict(pieces)


def remembered_pieces(
    contents: Mapping[str, PieceContent], *, of: Sequence[Path], cache_folder: Path
) -> tuple[Piece, ...]:
    """Return each content's name, size and hash; computed once for the same files ``of``.

    A file is the same while its path, size and time of change are.
    """
    memory = cache_folder / f"pieces-{identity(of)}.json"
    known = _recall(memory)
    if known is None or {p.name: p.size_bytes for p in known} != {
        name: content.size_bytes for name, content in contents.items()
    }:
        logger.info(
            "hashing %.1f MB of base weights, once",
            sum(content.size_bytes for content in contents.values()) / 1e6,
        )
        known = tuple(
            Piece(name=name, sha256=content.sha256(), size_bytes=content.size_bytes)
            for name, content in contents.items()
        )
        _remember(memory, known)
    return known


def _named(stored: Tensors, architecture: ModelArchitecture) -> dict[str, StoredTensor]:
    """Return the tensors under full names; what no side needs may be among them."""
    return {architecture.full_name(name): tensor for name, tensor in stored.items()}


def _shapes(
    architecture: ModelArchitecture, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters that pieces hold; nothing is allocated."""
    model = empty_model(config, architecture)
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if architecture.piece_of(name) is not None
    }


def _check(named: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(shapes.keys() - named.keys())
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} tensors that its config.json asks for (such as "
            f"{missing[0]}); it is incomplete, or of a model without what the task needs: a "
            "language-modelling head, or a pooler"
        )
    for name, shape in shapes.items():
        tensor = named[name]
        if tensor.dtype not in ITEM_BYTES:
            raise ModelError(
                f"{tensor.file}: {tensor.stored_name} is stored as {tensor.dtype}; quantised "
                f"checkpoints are not supported, use one in {', '.join(ITEM_BYTES)}"
            )
        if tensor.shape != shape:
            raise ModelError(
                f"{tensor.file}: {tensor.stored_name} has the shape {list(tensor.shape)}, but "
                f"config.json asks for {list(shape)}; they are not of the same model"
            )


def _check_tied(named: Tensors, architecture: ModelArchitecture) -> None:
    family = architecture.family
    head = named.get(f"{family.head}.weight")
    if not architecture.tied_embeddings or architecture.classifies or head is None:
        return
    embedding = named[f"{family.token_embedding}.weight"]
    if not np.array_equal(
        np.frombuffer(head.data, np.uint8), np.frombuffer(embedding.data, np.uint8)
    ):
        raise ModelError(
            f"{head.file}: {head.stored_name} differs from the token embeddings, but config.json "
            "ties them; if they are separate, set tie_word_embeddings to false there"
        )


def identity(files: Iterable[Path]) -> str:
    """Return a name for these files: the same while the path, size and time of change of each is.

    Raises:
        OSError: one is not there.
    """
    found = [_FORMAT]
    for file in files:
        stat = file.stat()
        found.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:32]


def _recall(memory: Path) -> tuple[Piece, ...] | None:
    try:
        return tuple(Piece(**piece) for piece in json.loads(memory.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):  # not there, or damaged: hash again
        return None


def _remember(memory: Path, pieces: Iterable[Piece]) -> None:
    values = [{"name": p.name, "sha256": p.sha256, "size_bytes": p.size_bytes} for p in pieces]
    try:
        replace_file(memory, json.dumps(values).encode(), durable=False)
    except StorageError as error:
        logger.warning("%s; until then every start hashes the base model again", error)
