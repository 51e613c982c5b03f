"""Texts with their classes, for a run that classifies: columns ``text``, ``text_pair``, ``label``.

Checked in full before the device does anything else in the run, for only the run says which
classes there are. No text, and no label, appears in an error: it may travel to the coordinator.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_agent.records import Record, Records, check_string
from shared import json_rows
from shared.errors import DataError
from shared.json_rows import Row

logger = logging.getLogger(__name__)

_NAMED = 10
"""Classes that an error lists."""


@dataclass(frozen=True, slots=True)
class Example:
    """One text, or a pair of texts, and the number of its class."""

    text: str = field(repr=False)
    pair: str | None = field(repr=False)
    label: int = field(repr=False)


def labelled(records: Records, classes: Sequence[str]) -> tuple[Example, ...]:
    """Return every record as an example of one of ``classes``.

    ``label`` is the name of a class, or its number counted from 0; where the names themselves are
    numbers, a number is a name. All records have a ``text_pair``, or none has.

    Raises:
        DataError: a column is missing or wrong, or a class does not exist; the message names
            file, line, reason and what to do.
    """
    numbers = _numbers(classes)
    paired = "text_pair" in records.records[0].row
    return tuple(
        _example(record, f"{records.path}:{record.line}", numbers=numbers, paired=paired)
        for record in records.records
    )


def warn_of_one_class(examples: Sequence[Example], records: Records) -> None:
    """Say it where all that is to be learnt from is of one class.

    No error: in a fleet with unequal data some devices know one class only.
    """
    if len({one.label for one in examples}) == 1:
        logger.warning(
            "%s: all %d records are of one class, so this device alone could not learn to tell "
            "classes apart; check the column 'label' unless that is how its data is",
            records.path,
            len(examples),
        )


def _example(record: Record, where: str, *, numbers: dict[str | int, int], paired: bool) -> Example:
    row = record.row
    if "label" not in row:
        raise DataError(
            f"{where}: this run classifies texts, and the line has no 'text' with a 'label'; "
            "add the class of each text"
        )
    if ("text_pair" in row) != paired:
        raise DataError(
            f"{where}: 'text_pair' is {'missing' if paired else 'here'}, unlike in the lines "
            "before; give it on every line or on none"
        )
    pair = check_string(row, "text_pair", where) if paired else None
    return Example(row["text"], pair, _label(row, where, numbers=numbers))


def _label(row: Row, where: str, *, numbers: dict[str | int, int]) -> int:
    value: Any = row["label"]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{where}: 'label' is {json_rows.kind(value)}, not a string or a whole number; "
            "write the name of the class, or its number"
        )
    if value not in numbers:
        names = [str(name) for name in numbers if isinstance(name, str)]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise DataError(
            f"{where}: 'label' is none of this run's classes, which are "
            f"{', '.join(names[:_NAMED])}{more}; correct it, or ask for the class to be added to "
            "training.classes"
        )
    return numbers[value]


def _numbers(classes: Sequence[str]) -> dict[str | int, int]:
    """Return the number of each class, by all that a label may say for it."""
    by_name: dict[str | int, int] = {name: number for number, name in enumerate(classes)}
    if any(name.lstrip("-").isdecimal() for name in classes):
        return by_name | {int(n): i for i, n in enumerate(classes) if n.lstrip("-").isdecimal()}
    return by_name | {number: number for number in range(len(classes))}
