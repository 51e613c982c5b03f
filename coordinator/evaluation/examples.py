"""What an adapter is evaluated on: prompts with their references, from files that people write."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from coordinator.evaluation import e2e
from shared import json_rows
from shared.errors import DataError
from shared.json_rows import Row

_COLUMNS = "'prompt' and 'completion', or 'prompt' and 'references' (a list)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and every text that was written for it, in the order of the files.

    Texts are as in training: a completion that begins with a space keeps it. ``where``: file
    and line at which the prompt came first.
    """

    prompt: str
    references: tuple[str, ...]
    where: str


_Found: TypeAlias = tuple[str, list[str], str]
"""Prompt, references, file and line."""


def load(files: Sequence[Path], *, limit: int | None = None) -> tuple[Example, ...]:
    """Return the distinct prompts of all files, the first ``limit`` of them, in order.

    A file that ends in ``.csv`` is the E2E challenge's (columns ``mr`` and ``ref``), any other
    one has JSON lines. Lines with the same prompt are one example.

    Raises:
        DataError: a file cannot be read, a line is wrong (file, line, what to do), or there is
            nothing to evaluate on.
    """
    references: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for prompt, texts, where in _found(files):
        references.setdefault(prompt, []).extend(texts)
        places.setdefault(prompt, where)
    if not references:
        names = ", ".join(str(file) for file in files)
        raise DataError(f"{names}: no lines; put one JSON object per line, with {_COLUMNS}")
    return tuple(
        Example(prompt=prompt, references=tuple(texts), where=places[prompt])
        for prompt, texts in islice(references.items(), limit)
    )


def _found(files: Sequence[Path]) -> Iterator[_Found]:
    for file in files:
        yield from _of_csv(file) if file.suffix.lower() == ".csv" else _of_json(file)


def _of_json(path: Path) -> Iterator[_Found]:
    with json_rows.opened(path) as file:
        for line in json_rows.rows(file, path):
            where = f"{path}:{line.number}"
            yield _text(line.row, "prompt", where), _references(line.row, where), where


def _references(row: Row, where: str) -> list[str]:
    given = [name for name in ("completion", "references") if name in row]
    if len(given) != 1:
        raise DataError(f"{where}: evaluation needs {_COLUMNS}; this line has {given or 'neither'}")
    if given == ["completion"]:
        return [_text(row, "completion", where)]
    texts = row["references"]
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where}: 'references' is not a list with texts in it; make it one")
    return [_checked(text, "a reference", where) for text in texts]


def _text(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise DataError(f"{where}: column {name!r} is missing; evaluation needs {_COLUMNS}")
    return _checked(row[name], repr(name), where)


def _checked(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {name} is {json_rows.kind(value)}, not a string; put it in quotes"
        )
    if not value.strip():
        raise DataError(f"{where}: {name} is empty; fill it in or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {name} holds half of a surrogate pair (\\ud800 to \\udfff); "
            "write the character itself as UTF-8"
        ) from None
    return value


def _of_csv(path: Path) -> Iterator[_Found]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _rows_of_csv(csv.reader(file, strict=True), path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the path given as data") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not csv ({error}); check the quotes in it") from error


def _rows_of_csv(rows: Iterator[list[str]], path: Path) -> Iterator[_Found]:
    header = [name.strip().lower() for name in next(rows, [])]
    if not {"mr", "ref"} <= set(header):
        raise DataError(
            f"{path}:1: the E2E challenge's csv has the columns 'mr' and 'ref'; write other data "
            f"as JSON lines with {_COLUMNS}"
        )
    meaning, reference = header.index("mr"), header.index("ref")
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"  # a text may hold line breaks, so lines tell nothing
        if len(row) != len(header):
            raise DataError(f"{where} has {len(row)} columns, the header {len(header)}; correct it")
        prompt = e2e.prompt(row[meaning])
        if prompt is None:
            raise DataError(f"{where}: 'mr' is not of the form name[...], food[...]; correct it")
        yield prompt, [e2e.completion(_checked(row[reference], "'ref'", where))], where
