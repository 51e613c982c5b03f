"""Exported graphs on disk: a file for each, named by its SHA-256, and an index of them all.

The index is written last, and everything is verified when it is read: so a folder that is half
written, or damaged, is one without graphs, and two programs that write one folder at once leave
a whole set, whoever was last.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coordinator import piece_content
from coordinator.piece_content import PieceContent
from shared.atomic import replace_file
from shared.protocol.messages import Piece

logger = logging.getLogger(__name__)

INDEX = "graphs.json"
_PIECES: TypeAdapter[tuple[Piece, ...]] = TypeAdapter(tuple[Piece, ...])


@dataclass(frozen=True, slots=True, eq=False)
class StoredGraphs:
    """All graphs of one run: what they are called, and their bytes by SHA-256."""

    pieces: tuple[Piece, ...]
    contents: Mapping[str, PieceContent]

    def read(self, sha256: str, *, offset: int, length: int) -> memoryview:
        """Return bytes of a graph.

        Raises:
            ProtocolError: no such graph, or the range is not inside it.
        """
        return piece_content.read(self.contents, sha256, offset=offset, length=length)


def save(folder: Path, graphs: Mapping[str, bytes]) -> None:
    """Write graphs, by name, so that `load` finds all of them or none.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    pieces = []
    for name, data in graphs.items():
        sha256 = hashlib.sha256(data).hexdigest()
        replace_file(_file(folder, sha256), data)
        pieces.append(Piece(name=name, sha256=sha256, size_bytes=len(data)))
    replace_file(folder / INDEX, _PIECES.dump_json(tuple(pieces), indent=1))


def load(folder: Path) -> StoredGraphs | None:
    """Return the graphs of a folder; None where there are none, or where anything is damaged."""
    try:
        index = (folder / INDEX).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read (%s): its graphs are made anew", folder, error.strerror)
        return None
    try:
        pieces = _PIECES.validate_json(index)
        contents = {piece.sha256: _verified(folder, piece) for piece in pieces}
    except (OSError, ValueError) as error:
        reason = "its index is damaged" if isinstance(error, ValidationError) else error
        logger.warning("%s is not used, its graphs are made anew: %s", folder, reason)
        return None
    return StoredGraphs(pieces, contents)


def _verified(folder: Path, piece: Piece) -> PieceContent:
    data = _file(folder, piece.sha256).read_bytes()
    if hashlib.sha256(data).hexdigest() != piece.sha256:
        raise ValueError(f"{piece.name} is damaged")
    return PieceContent((memoryview(data),))


def _file(folder: Path, sha256: str) -> Path:
    return folder / f"{sha256}.onnx"
