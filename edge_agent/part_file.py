"""A file that grows from the network, survives a restart, and becomes real when its hash is right.

Unfinished bytes of ``<sha256>`` stand in ``<sha256>.0.part``, always a true beginning. Whoever
appends holds an exclusive lock on it; a second agent on the same folder finds it taken and
uses ``<sha256>.1.part``. A part that nobody holds belongs to whoever comes next, so what a
killed agent left is continued and none is left over for good.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shared.errors import ModelError, StorageError
from shared.protocol.messages import Piece
from shared.protocol.tensors import Buffer

READ_BYTES = 1 << 20


class PartFile:
    """The unfinished file of one piece, locked for this process until closed or finished.

    One thread only.
    """

    def __init__(self, folder: Path, piece: Piece) -> None:
        """Continue what is there, or begin.

        Raises:
            StorageError: the folder cannot be written or does not support locks.
        """
        self._folder = folder
        self._piece = piece
        with storage_errors(folder):
            self._path, self._fd = _claim(folder, piece.sha256)
            self._hash = hashlib.sha256()
            self._size = self._hash_what_is_there()

    @property
    def size_bytes(self) -> int:
        """How many bytes are there."""
        return self._size

    def append(self, data: Buffer) -> None:
        """Write the next bytes.

        Raises:
            StorageError: the disk is full or failed; what was written stays usable.
        """
        view = memoryview(data).cast("B")
        self._hash.update(view)
        with storage_errors(self._folder, needed_bytes=self._piece.size_bytes - self._size):
            while view:
                written = os.write(self._fd, view)
                view = view[written:]
                self._size += written

    def finish(self) -> int | None:
        """Give the file its final name; return a descriptor with a shared lock on it.

        None: another agent finished the same piece first, its file stays and ours is deleted.

        Raises:
            ModelError: the bytes are not those of the piece; they are deleted.
            StorageError: the disk failed.
        """
        if self._hash.hexdigest() != self._piece.sha256:
            self.discard()
            raise ModelError(
                f"piece {self._piece.name}: the {self._size} bytes received do not have the "
                f"SHA-256 {self._piece.sha256}; they were deleted and must be fetched again"
            )
        final = self._folder / self._piece.sha256
        with storage_errors(self._folder):
            if final.exists():
                self.discard()
                return None
            os.fsync(self._fd)
            self._path.rename(final)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            _sync_folder(self._folder)
        return self._fd

    def discard(self) -> None:
        """Delete the unfinished file."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file and leave it for whoever continues it."""
        os.close(self._fd)

    def _hash_what_is_there(self) -> int:
        size = os.fstat(self._fd).st_size
        if size > self._piece.size_bytes:  # not ours: a true beginning is never longer
            os.ftruncate(self._fd, 0)
            return 0
        while data := os.read(self._fd, READ_BYTES):
            self._hash.update(data)
        return size


def remove_unheld_parts(folder: Path, *, sha256: str = "*") -> None:
    """Delete unfinished files that no process is writing."""
    for path in folder.glob(f"{sha256}.*.part"):
        fd = _lock(path)
        if fd is not None:
            path.unlink(missing_ok=True)
            os.close(fd)


@contextlib.contextmanager
def storage_errors(folder: Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(disk_full(folder, needed_bytes)) from error
        if error.errno in (errno.ENOLCK, errno.ENOTSUP):
            what = "this file system has no locks; choose a cache_folder on a local disk"
        else:
            what = "check the folder's owner and mode, or choose another cache_folder"
        raise StorageError(f"{folder}: {error.strerror}; {what}") from error


def is_still(path: Path, fd: int) -> bool:
    """Return whether ``fd`` is open on what is now at ``path``."""
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def disk_full(folder: Path, needed_bytes: int | None) -> str:
    """Return the words for a full disk, with the numbers."""
    free = shutil.disk_usage(folder).free
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes more are needed and "
    return (
        f"{folder}: disk full: {needed}{free:,} are free; "
        "free some space, or choose a cache_folder on another disk"
    )


def _claim(folder: Path, sha256: str) -> tuple[Path, int]:
    for number in itertools.count():  # ends: at most as many parts are held as agents run
        path = folder / f"{sha256}.{number}.part"
        fd = _lock(path, create=True)
        if fd is not None:
            return path, fd
    raise AssertionError


def _lock(path: Path, *, create: bool = False) -> int | None:
    """Return a descriptor with an exclusive lock on the file at ``path``, or None if held."""
    flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0)
    while True:
        try:
            fd = os.open(path, flags, 0o644)
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            os.close(fd)
            raise
        # Its last holder may have renamed or deleted it between our open and our lock.
        if is_still(path, fd):
            return fd
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
