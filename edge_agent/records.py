"""The device's own text: JSON lines, checked in full before the agent joins anything.

Three formats, one per file: ``text``; ``prompt`` and ``completion``; ``messages`` (a list of
``{"role", "content"}``; whatever else a message holds is handed to the chat template). Other
columns are ignored, blank lines are skipped. Beside ``text`` the columns ``text_pair`` and
``label`` are kept unread: only a run that classifies looks at them (`edge_agent.labelled`).
Text and column names of a record appear in no error, log line or ``repr``: an error may travel
to the coordinator as the reason for leaving.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from shared import json_rows
from shared.errors import DataError
from shared.json_rows import JsonRow, Row

Format: TypeAlias = Literal["text", "prompt", "messages"]
"""Named after the column that a line is recognised by."""

_FORMATS = "'text', or 'prompt' and 'completion', or 'messages'"
_KNOWN: tuple[Format, ...] = ("text", "prompt", "messages")


@dataclass(frozen=True, slots=True)
class Record:
    """One checked line; ``row`` holds only the columns of its format."""

    line: int
    row: Row = field(repr=False)


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one file (or of a part of it), all of one format."""

    path: Path
    format: Format
    records: tuple[Record, ...] = field(repr=False)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.records)

    @classmethod
    def load(cls, path: Path) -> Records:
        """Return every record of a JSON-lines file.

        Raises:
            DataError: the file cannot be read or holds no record, or a line is wrong; the
                message names file, line, reason and what to do.
        """
        found: Format | None = None
        records: list[Record] = []
        for line in _lines(path):
            where = f"{path}:{line.number}"
            this = _format_of(line.row, where=where)
            record = Record(line.number, _CHECKS[this](line.row, where))
            if found is not None and this != found:
                raise DataError(
                    f"{where}: this line is of the format {this!r}, line {records[0].line} "
                    f"of {found!r}; split them into two files, one format each"
                )
            found = this
            records.append(record)
        if found is None:
            raise DataError(f"{path}: no records; put one JSON object per line, with {_FORMATS}")
        return cls(path, found, tuple(records))

    def split(self, held_out_fraction: float, *, seed: int) -> tuple[Records, Records]:
        """Return (training part, held-out part): disjoint, and the same for the same seed.

        With a fraction above 0 and at least two records neither part is empty; with one
        record the held-out part is.
        """
        count = round(len(self) * held_out_fraction)
        if held_out_fraction > 0:
            count = min(max(1, count), len(self) - 1)
        chosen = random.Random(seed).sample(range(len(self)), count)  # noqa: S311 - no secret
        held = set(chosen)
        return self._part(held, kept=False), self._part(held, kept=True)

    def _part(self, chosen: set[int], *, kept: bool) -> Records:
        part = (r for i, r in enumerate(self.records) if (i in chosen) == kept)
        return Records(self.path, self.format, tuple(part))


@dataclass(frozen=True, slots=True)
class DeviceRecords:
    """A device's training and held-out records (None: nothing to hold out)."""

    training: Records
    held_out: Records | None


def load(data: Path, *, evaluation_data: Path | None, evaluation_fraction: float) -> DeviceRecords:
    """Return the records of ``data``; held out is ``evaluation_data`` or a share of ``data``.

    The share is chosen once and for all by the number of records, not by a run's seed: what
    was held out in one run is held out in every run on the same file.

    Raises:
        DataError: see `Records.load`.
    """
    records = Records.load(data)
    if evaluation_data is not None:
        return DeviceRecords(records, Records.load(evaluation_data))
    training, held_out = records.split(evaluation_fraction, seed=0)
    return DeviceRecords(training, held_out if len(held_out) else None)


def _lines(path: Path) -> Iterator[JsonRow]:
    with json_rows.opened(path) as file:
        yield from json_rows.rows(file, path)


def _format_of(row: Row, *, where: str) -> Format:
    formats = [name for name in _KNOWN if name in row]
    if len(formats) == 1:
        return formats[0]
    if formats:
        names = " and ".join(repr(name) for name in formats)
        raise DataError(f"{where}: has {names}; keep only the columns of one format: {_FORMATS}")
    if "completion" in row:
        raise DataError(f"{where}: column 'prompt' is missing; add it, or call the other 'text'")
    raise DataError(f"{where}: has none of the columns {_FORMATS}; rename the column that holds it")


def _check_text(row: Row, where: str) -> Row:
    unread = {name: row[name] for name in ("text_pair", "label") if name in row}
    return {"text": check_string(row, "text", where), **unread}


def _check_prompt(row: Row, where: str) -> Row:
    if "completion" not in row:
        raise DataError(f"{where}: column 'completion' is missing; add it, or use 'text' instead")
    return {name: check_string(row, name, where) for name in ("prompt", "completion")}


def _check_messages(row: Row, where: str) -> Row:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is not a list with messages in it; make it one")
    checked = [
        _check_message(message, where=f"{where}: message {number}")
        for number, message in enumerate(messages, start=1)
    ]
    if not any(m["role"] == "assistant" and m["content"].strip() for m in checked):
        raise DataError(
            f"{where}: no message with the role 'assistant' says anything, so there is nothing "
            "to learn; add the answer or remove the line"
        )
    return {"messages": checked}


def _check_message(message: object, *, where: str) -> Row:
    if not isinstance(message, dict):
        raise DataError(
            f"{where} is {json_rows.kind(message)}; make it {{'role': ..., 'content': ...}}"
        )
    for name in ("role", "content"):
        if name not in message:
            raise DataError(f"{where} has no {name!r}; add it")
    check_string(message, "role", where)
    # An empty system or user message is legal in every chat template.
    check_string(message, "content", where, may_be_blank=True)
    _check_encodable(json.dumps(message, ensure_ascii=False), where)
    return message


def check_string(row: Row, name: str, where: str, *, may_be_blank: bool = False) -> str:
    """Return column ``name`` of a row that stands at ``where``.

    Raises:
        DataError: it is no string, is blank where it may not be, or cannot be encoded.
    """
    value = row[name]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {name!r} is {json_rows.kind(value)}, not a string; put it in quotes"
        )
    if not value.strip() and not may_be_blank:
        raise DataError(f"{where}: {name!r} is empty; fill it in or remove the line")
    _check_encodable(value, f"{where}: {name!r}")
    return value


def _check_encodable(value: str, where: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff); "
            "write the character itself as UTF-8"
        ) from None


_CHECKS = {"text": _check_text, "prompt": _check_prompt, "messages": _check_messages}
