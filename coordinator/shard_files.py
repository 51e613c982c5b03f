"""``hsplit-coordinator shard``: one file of JSON lines, cut into one file for each device.

Lines are copied byte for byte. What is kept in memory of a line is where it lies and its class, so
that a file may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordinator.atomic_folder import replacing
from coordinator.report.wording import shortened
from coordinator.sharding import Classes, Indices, Rule, split
from shared import json_rows, version
from shared.errors import ConfigError, DataError
from shared.json_rows import JsonRow
from shared.protocol.messages import NAME_PATTERN

logger = logging.getLogger(__name__)

SHARDS_FILE = "shards.json"
DEFAULT_COLUMN = "label"
MOST_DEVICES = 100_000
_MOST_NAMED = 3
_LONGEST_NAME = 28


@dataclass(frozen=True, slots=True)
class Shard:
    """What one device got; ``classes``: how many records of each, the most frequent first."""

    device: str
    records: int
    classes: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class _Lines:
    """Where every record of a file lies, and of which class it is."""

    offset_N: Indices
    size_N: Indices
    classes: Classes


def device_names(text: str) -> tuple[str, ...]:
    """Return the devices that ``NAME,NAME,...`` or a number means: 3 is device-1 to device-3.

    Raises:
        ConfigError: a name that no device may have, or a number out of range.
    """
    if text.isdecimal():
        if len(text) > 9 or not 1 <= int(text) <= MOST_DEVICES:
            raise ConfigError(f"devices {text}: must be from 1 to {MOST_DEVICES:,}")
        return tuple(f"device-{i:0{len(text)}}" for i in range(1, int(text) + 1))
    names = tuple(text.split(","))
    for name in names:
        if not re.fullmatch(NAME_PATTERN, name) or name.endswith("\n"):
            raise ConfigError(
                f"devices: {name!r} is no device's name; a name has up to 64 letters, digits, "
                "dots, dashes and underscores, and begins with a letter or digit"
            )
    return names


def shard(data: Path, to: Path, *, rule: Rule, column: str | None = None) -> tuple[Shard, ...]:
    """Write ``to``/<device>.jsonl for every device, and ``shards.json``: all of them or nothing.

    ``column`` holds a record's class: by label, `DEFAULT_COLUMN` where it is None; in other
    splits its values are only counted.

    Raises:
        ConfigError: ``to`` holds something already.
        DataError: the file cannot be read or changes meanwhile, a line is wrong or lacks the
            column, or there are too few records.
        StorageError: the disk is full, or the folder cannot be written.
    """
    to = to.resolve()
    _check_free(to)
    if rule.by == "label":
        column = column or DEFAULT_COLUMN
    with json_rows.opened(data) as file:
        before = _state(file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        lines = _indexed(file, data, column=column)
        parts = split(lines.classes, rule)
        shards = tuple(
            Shard(device, len(part), _counts(lines.classes, part) if column else {})
            for device, part in zip(rule.devices, parts, strict=True)
        )
        with replacing(to) as folder:
            for device, part in zip(rule.devices, parts, strict=True):
                _copy(file, folder / f"{device}.jsonl", lines=lines, part=part)
            manifest = _manifest(data, digest, rule=rule, column=column, shards=shards)
            (folder / SHARDS_FILE).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
            if _state(file) != before:
                raise DataError(f"{data}: the file changed while it was read; try again")
    return shards


def as_table(shards: Sequence[Shard]) -> str:
    """Return the shards as lines for people, with the most frequent classes of each."""
    total = sum(one.records for one in shards)
    width = max(len("device"), *(len(one.device) for one in shards))
    counted = any(one.classes for one in shards)
    rows = [f"{'device':{width}}  {'records':>9}  share" + ("  classes" if counted else "")]
    for one in shards:
        share = f"{one.records / total:.1%}"
        row = f"{one.device:{width}}  {one.records:>9,}  {share:>5}  {_classes_in_words(one)}"
        rows.append(row.rstrip())
    return "\n".join(rows)


def _classes_in_words(one: Shard) -> str:
    named = list(one.classes.items())[:_MOST_NAMED]
    words = ", ".join(
        f"{shortened(' '.join(name.split()), _LONGEST_NAME)} {count:,}" for name, count in named
    )
    more = len(one.classes) - len(named)
    return f"{words}, {more} more" if more else words


def _check_free(to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise ConfigError(f"{to} is a file; name a folder that is empty or not there yet")
    if to.is_dir() and any(to.iterdir()):
        what = "an earlier split" if (to / SHARDS_FILE).exists() else "other files"
        raise ConfigError(f"{to} holds {what}; remove it, or name another folder")


def _state(file: io.BufferedReader) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _indexed(file: io.BufferedReader, data: Path, *, column: str | None) -> _Lines:
    offsets, sizes, indices = array("q"), array("q"), array("q")
    names: dict[str, int] = {}
    for row in json_rows.rows(file, data):
        name = _class_of(row, column, where=f"{data}:{row.number}") if column else ""
        offsets.append(row.offset)
        sizes.append(row.size_bytes)
        indices.append(names.setdefault(name, len(names)))
    if not offsets:
        raise DataError(f"{data}: no records; put one JSON object per line")
    if len(names) > max(20, len(offsets) // 2):
        logger.warning(
            "%s: column %r has %d values in %d records, so it says little about a record; "
            "choose another column, if its values were meant to be classes",
            *(data, column, len(names), len(offsets)),
        )
    found = (np.frombuffer(numbers, dtype=np.int64) for numbers in (offsets, sizes, indices))
    offset_N, size_N, index_N = found
    return _Lines(offset_N, size_N, Classes(tuple(names), index_N))


def _class_of(line: JsonRow, column: str, *, where: str) -> str:
    if column not in line.row:
        known = ", ".join(repr(name) for name in list(line.row)[:8]) or "no column at all"
        raise DataError(
            f"{where}: column {column!r} is missing, there is {known}; "
            "name the column of the class with --column, or add it to the line"
        )
    value = line.row[column]
    if value is None or isinstance(value, (list, dict)):
        raise DataError(
            f"{where}: column {column!r} is {json_rows.kind(value)}; a class is a string, "
            "a number or true or false"
        )
    return value if isinstance(value, str) else json.dumps(value)


def _counts(classes: Classes, part: Indices) -> dict[str, int]:
    found, counts = np.unique(classes.index_N[part], return_counts=True)
    by_name = {classes.names[i]: int(count) for i, count in zip(found, counts, strict=True)}
    return dict(sorted(by_name.items(), key=lambda item: (-item[1], item[0])))


def _copy(file: io.BufferedReader, to: Path, *, lines: _Lines, part: Indices) -> None:
    with to.open("wb") as out:
        for index in part:
            file.seek(lines.offset_N[index])
            line = file.read(lines.size_N[index])
            # The last line of a file may have no end.
            out.write(line if line.endswith(b"\n") else line + b"\n")


def _manifest(
    data: Path, digest: str, *, rule: Rule, column: str | None, shards: Sequence[Shard]
) -> dict[str, object]:
    return {
        "made_by": f"hsplit {version.VERSION}",
        "input": {
            "name": data.name,
            "sha256": digest,
            "records": sum(one.records for one in shards),
        },
        "arguments": {
            "devices": list(rule.devices),
            "by": rule.by,
            "column": column,
            "alpha": rule.concentration if rule.is_drawn else None,
            "sizes": rule.sizes,
            "seed": rule.seed,
            "min_records": rule.min_records,
        },
        "devices": {
            one.device: {"records": one.records, "classes": dict(one.classes)} for one in shards
        },
    }
