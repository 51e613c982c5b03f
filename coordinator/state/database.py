"""``state.sqlite`` as a file: opened, checked and made, in transactions, with errors of ours.

``synchronous`` is NORMAL: in WAL mode that cannot damage the database, a killed program loses
nothing, and a power cut at most the newest transactions, which are then of the open round, for
the closing of a round is ``durable``: it is fsynced, and all before it (`run_state` says why).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from coordinator.state import statements
from shared.errors import StorageError

STATE_FILE: Final = "state.sqlite"
BUSY_S: Final = 10.0
"""So long another program may write before ours gives up; readers hold up nobody."""
LEAST_SQLITE: Final = (3, 37)
"""The first with STRICT tables."""

_AWAY = (
    "move it away (with its -wal and -shm); the next start with --resume makes a new one, and "
    "only the record of earlier rounds is lost: what they learnt is in the checkpoints"
)
_WHAT_TO_DO = {
    sqlite3.SQLITE_FULL: "free some space, then go on with --resume",
    sqlite3.SQLITE_IOERR: "see to the disk and its space, then go on with --resume",
    sqlite3.SQLITE_CORRUPT: _AWAY,
    sqlite3.SQLITE_NOTADB: _AWAY,
    sqlite3.SQLITE_BUSY: "another program writes it: close that, then go on with --resume",
    sqlite3.SQLITE_CANTOPEN: "correct the permissions of its folder",
    sqlite3.SQLITE_READONLY: "correct its permissions, and those of its folder",
}


def opened(path: Path) -> sqlite3.Connection:
    """Return a connection that writes ``path``, which is made where there is none.

    Raises:
        StorageError: it is damaged, not ours or of another version, or cannot be written.
    """
    if sqlite3.sqlite_version_info < LEAST_SQLITE:
        raise StorageError(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed")
    try:
        path.touch()  # with the mode of the folder's other files; SQLite's would be narrower
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    with translated(path):
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection that only reads ``path``, also while a coordinator writes it.

    All that is read in it is of one moment.

    Raises:
        StorageError: there is none, or it is damaged, not ours or of another version.
    """
    if not path.exists():
        raise StorageError(f"there is no {path}: the folder is no run's, or of an older hsplit")
    with translated(path):
        # Without a log nobody writes; then it needs none either, which would be left behind.
        mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
        uri = f"file:{quote(str(path.resolve()))}?{mode}"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("BEGIN")
            if _is_new(connection):
                raise StorageError(f"{path} holds nothing yet; ask again")
            _check_ours(connection, path)
            yield connection


@contextlib.contextmanager
def transaction(
    connection: sqlite3.Connection, path: Path, *, durable: bool = False
) -> Iterator[None]:
    """Commit all that the block writes, or nothing; ``durable``: not even a power cut undoes it.

    Raises:
        StorageError: the disk is full or broken, or what is written contradicts what is there.
    """
    with translated(path):
        connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # a full disk may have ended it already
                connection.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise `StorageError` for SQLite's errors, with what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        # The low byte is the kind, what is above it says more.
        advice = _WHAT_TO_DO.get(code & 0xFF, "") if code is not None else ""
        raise StorageError(f"{path}: {error}" + (f"; {advice}" if advice else "")) from error


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if _is_new(connection):
        connection.executescript(
            f"BEGIN IMMEDIATE; {statements.SCHEMA}"
            f"PRAGMA application_id = {statements.APPLICATION_ID};"
            f"PRAGMA user_version = {statements.SCHEMA_VERSION}; COMMIT;"
        )
    _check_ours(connection, path)
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise StorageError(f"{path} is damaged ({' '.join(found.split())}); {_AWAY}")
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StorageError(
            f"{path}: this file system does not let SQLite keep a write-ahead log; put run.folder "
            "on a local disk"
        )
    connection.execute("PRAGMA foreign_keys = ON")


def _is_new(connection: sqlite3.Connection) -> bool:
    """Tell whether nothing was ever written, or the program that began to was killed."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    return not tables and not _pragma(connection, "application_id")


def _check_ours(connection: sqlite3.Connection, path: Path) -> None:
    if _pragma(connection, "application_id") != statements.APPLICATION_ID:
        raise StorageError(f"{path} is a database of another program; move it away")
    version = _pragma(connection, "user_version")
    if version != statements.SCHEMA_VERSION:
        raise StorageError(
            f"{path} is of schema {version}, this hsplit knows {statements.SCHEMA_VERSION}: use the"
            f" version that wrote it, or {_AWAY}"
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return int(value)
