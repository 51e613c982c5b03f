"""JSON lines that people write: one object a line, and words for what is wrong with a line.

Blank lines are skipped, and so is a byte order mark. Text and column names of a row appear in no
error: an agent's error may travel to the coordinator as the reason for leaving.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from shared.errors import DataError

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One line that is not blank: its number from 1, where its bytes lie, and what it says.

    ``size_bytes`` counts the end of the line where there is one, but no byte order mark.
    """

    number: int
    offset: int
    size_bytes: int
    row: Row = field(repr=False)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Yield the file, to be read as bytes.

    Raises:
        DataError: there is no such file, or it cannot be opened or read in the block.
    """
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path given as data") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def rows(file: io.BufferedReader, path: Path) -> Iterator[JsonRow]:
    """Yield every row of ``file`` from its beginning; ``path`` is its name in errors.

    Raises:
        DataError: a line is not UTF-8, or no JSON object; the message names file and line.
    """
    offset = 0
    for line, raw in enumerate(file, start=1):
        where = f"{path}:{line}"
        own = _without_mark(raw, where) if line == 1 else raw
        text = _decode(own, where)
        if text.strip():
            skipped = len(raw) - len(own)
            yield JsonRow(line, offset + skipped, len(own), _parse(text, where=where))
        offset += len(raw)


def kind(value: object) -> str:
    """Return what a JSON value is, in words: ``a list``."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def _without_mark(raw: bytes, where: str) -> bytes:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{where}: the file is UTF-16; save it as UTF-8")
    return raw.removeprefix(codecs.BOM_UTF8)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # `from None`: a UnicodeDecodeError carries the whole line, which a traceback may show.
        reason = f"not UTF-8 at byte {error.start + 1} of the line"
        raise DataError(f"{where}: {reason}; save the file as UTF-8") from None


def _parse(text: str, *, where: str) -> Row:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        # `from None`: a JSONDecodeError carries the whole line, as above.
        reason = f"not JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{where}: {reason}; write one JSON object per line") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: JSON too deep or with a number too long; simplify it") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object but {kind(row)}; write {{...}} on each line")
    return row
