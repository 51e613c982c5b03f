"""The device's store of base weights: one file per piece, named by its SHA-256.

``<folder>/<sha256>`` is complete and was verified; unfinished files are `part_file`'s matter.
Several agents may share a folder: a file in use carries a shared lock of each process that
uses it, and `prune` leaves such files alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from edge_agent.part_file import READ_BYTES, PartFile, is_still, remove_unheld_parts, storage_errors
from shared.errors import ModelError
from shared.protocol.messages import Piece

logger = logging.getLogger(__name__)

_COMPLETE = re.compile(r"^[0-9a-f]{64}$")


class ModelCache:
    """Complete pieces on disk. Every file is verified once in each process before it is used.

    One thread only.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder, making it where it is missing.

        Raises:
            StorageError: it cannot be made or written.
        """
        self.folder = folder
        self._held: dict[str, int] = {}
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def missing(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        """Return the pieces that must be fetched, each content once, in the same order.

        Reads and hashes each file that this process has not verified yet; a damaged one is
        deleted and counts as missing.
        """
        distinct = {piece.sha256: piece for piece in pieces}
        return tuple(piece for piece in distinct.values() if not self._verified(piece))

    def path(self, piece: Piece) -> Path:
        """Return the verified file of a piece, which stays on disk until this process ends.

        Raises:
            ModelError: it is not here, or was damaged.
        """
        if not self._verified(piece):
            raise ModelError(
                f"piece {piece.name} ({piece.sha256}) is not in {self.folder}; fetch it first"
            )
        return self.folder / piece.sha256

    def add(self, piece: Piece, part: PartFile) -> Path:
        """Turn the complete part of ``piece`` into a file of the cache; return its path.

        Raises:
            ModelError: its bytes are not those of the piece; they are deleted.
            StorageError: the disk failed.
        """
        fd = part.finish()
        if fd is not None:
            self._held[piece.sha256] = fd
        return self.path(piece)

    def prune(self, limit_bytes: int) -> int:
        """Delete the files used longest ago, until ``limit_bytes`` are held; return bytes freed.

        Files in use by any agent stay, even above the limit. Unfinished files that nobody is
        writing go first.
        """
        with storage_errors(self.folder):
            remove_unheld_parts(self.folder)
            files = [(path.stat(), path) for path in self.folder.iterdir() if _is_complete(path)]
            files.sort(key=lambda pair: pair[0].st_mtime_ns)
            excess = sum(stat.st_size for stat, _ in files) - limit_bytes
            freed = 0
            for stat, path in files:
                if freed >= excess:
                    break
                freed += stat.st_size if _remove_unused(path) else 0
        return freed

    def close(self) -> None:
        """Let go of all files. May be called twice."""
        while self._held:
            os.close(self._held.popitem()[1])

    def _verified(self, piece: Piece) -> bool:
        if piece.sha256 in self._held:
            return True
        path = self.folder / piece.sha256
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        with storage_errors(self.folder):
            if not self._is_good(path, fd, piece.sha256):
                os.close(fd)
                return False
            os.utime(path)  # `prune` deletes by the time of last use
        self._held[piece.sha256] = fd
        return True

    def _is_good(self, path: Path, fd: int, sha256: str) -> bool:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not is_still(path, fd):  # pruned between our open and our lock
            return False
        if _hash_of(fd) != sha256:
            logger.warning("%s is damaged; it is deleted and fetched again", path)
            path.unlink(missing_ok=True)
            return False
        return True


def _hash_of(fd: int) -> str:
    digest = hashlib.sha256()
    while data := os.read(fd, READ_BYTES):
        digest.update(data)
    return digest.hexdigest()


def _is_complete(path: Path) -> bool:
    return _COMPLETE.match(path.name) is not None


def _remove_unused(path: Path) -> bool:
    """Delete the file unless a process uses it; return whether it was deleted."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
