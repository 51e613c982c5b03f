"""A folder that appears whole or not at all, whatever kills the program while it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import StorageError


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends, it takes ``folder``'s place.

    Files and folders are fsynced before the rename. Where the block raises, ``folder`` is as
    before. A rename cannot replace a folder that is not empty, so one that exists is moved
    aside first: a crash just between the two renames leaves it beside, as ``.<name>.old``.
    One program at a time may write one ``folder``.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    try:
        try:
            _remove(fresh)
            fresh.mkdir(parents=True)
            yield fresh
            _sync(fresh)
            _swap(folder, fresh=fresh, old=old)
        finally:
            _remove(fresh)
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}; "
            "free some space or correct the permissions, then try again"
        ) from error


def _swap(folder: Path, *, fresh: Path, old: Path) -> None:
    if folder.exists():
        _remove(old)
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync_one(folder.parent)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
