"""Files of JSON lines that a run writes as it goes, and goes on with after a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shared.atomic import replace_file
from shared.clock import Clock
from shared.errors import StorageError


def opened(path: Path, *, resumed_step: int | None) -> BinaryIO:
    """Return the file of a run, open for `append`, without what the run will write again.

    ``resumed_step``: the run goes on from a checkpoint after this many steps; lines of later
    steps are dropped. None begins anew.

    Raises:
        StorageError: the folder cannot be written.
    """
    kept = [] if resumed_step is None else list(_kept_lines(path, resumed_step))
    replace_file(path, b"".join(kept))
    return path.open("ab", buffering=0)


def head(clock: Clock, *, round_: int, step: int) -> dict[str, Any]:
    """Return what every line begins with: when it was written, after how many optimizer steps."""
    return {"time": clock.wall_s(), "round": round_, "step": step}


def append(file: BinaryIO, record: Mapping[str, Any]) -> None:
    """Write one line at once. A number that is not finite becomes null: JSON has no NaN.

    Raises:
        StorageError: the disk is full.
    """
    rest = json.dumps(jsonable(record), allow_nan=False).encode() + b"\n"
    try:
        while rest:  # a disk that is nearly full takes a part
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise StorageError(f"{file.name} cannot be written: {error.strerror}") from error


def jsonable(value: Any) -> Any:
    """Return ``value`` with null for what is not finite, and plain numbers for numpy's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(one) for one in value]
    return value


def records(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file, oldest first; none where there is no such file.

    Lines that are no JSON objects are left out: a run that is at work, or that was killed, ends
    in half a line.

    Raises:
        StorageError: the file is there but cannot be read.
    """
    return [record for _, record in _parsed(path)]


def _parsed(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each whole line that holds an object, and the object."""
    for line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith(b"\n") and isinstance(record, dict):
            yield line, record


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error


def _kept_lines(path: Path, resumed_step: int) -> Iterator[bytes]:
    for line, record in _parsed(path):
        step = record.get("step")
        if isinstance(step, int) and step <= resumed_step:
            yield line
