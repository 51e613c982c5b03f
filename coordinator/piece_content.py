"""The bytes of content-addressed pieces, and how ranges of them are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shared.errors import ProtocolError
from shared.weight_files import StoredTensor, header, in_file_order

Tensors: TypeAlias = Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True, eq=False)
class PieceContent:
    """The bytes of a piece, as consecutive views of what is mapped."""

    views: tuple[memoryview, ...] = field(repr=False)

    @classmethod
    def of(cls, tensors: Tensors) -> PieceContent:
        """Return a safetensors file that holds ``tensors``: a header, then their own bytes."""
        ordered = in_file_order(tensors)
        return cls((memoryview(header(ordered)), *(t.data for t in ordered.values())))

    @property
    def size_bytes(self) -> int:
        """How many bytes there are."""
        return sum(view.nbytes for view in self.views)

    def sha256(self) -> str:
        """Return the hash of all bytes, as hex."""
        digest = hashlib.sha256()
        for view in self.views:
            digest.update(view)
        return digest.hexdigest()

    def read(self, offset: int, length: int) -> memoryview:
        """Return a range of bytes, without a copy where it lies in one view."""
        parts = list(self._overlaps(offset, offset + length))
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _overlaps(self, start: int, end: int) -> Iterator[memoryview]:
        first = 0
        for view in self.views:
            if first < end and start < first + view.nbytes:
                yield view[max(0, start - first) : end - first]
            first += view.nbytes


def read(
    contents: Mapping[str, PieceContent], sha256: str, *, offset: int, length: int
) -> memoryview:
    """Return bytes of a piece; ``contents``: those that there are, by SHA-256.

    Raises:
        ProtocolError: no such piece, or the range is not inside it.
    """
    content = contents.get(sha256)
    if content is None:
        raise ProtocolError(f"this model has no piece {sha256}")
    if offset < 0 or length < 1 or offset + length > content.size_bytes:
        raise ProtocolError(
            f"bytes {offset} to {offset + length} are not in piece {sha256}, "
            f"which has {content.size_bytes}"
        )
    return content.read(offset, length)
