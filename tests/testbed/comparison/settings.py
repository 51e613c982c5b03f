"""What was run, as the results file says it: words, lists, and a table of the devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.report import wording
from coordinator.report.page import Row, Section, Table
from tests.testbed.comparison.results import Comparison

_IN_SHORT = ("title", "model", "data", "date", "machine")


def in_short(comparison: Comparison) -> str:
    """Return the settings that say what this is, in one line."""
    found = [comparison.settings.get(key) for key in _IN_SHORT]
    return " · ".join(_words(value) for value in found if value is not None)


def section(comparison: Comparison) -> Section:
    """Return every setting."""
    plain = {k: v for k, v in comparison.settings.items() if not _is_table(v)}
    tables = [_by_name(k, v) for k, v in comparison.settings.items() if _is_table(v)]
    rows = [Row((key.replace("_", " "), _words(value))) for key, value in plain.items()]
    if rows:
        tables.append(Table(columns=("setting", "value"), rows=rows))
    return Section(title="Settings", tables=tables)


def _is_table(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(row, Mapping) for row in value.values())
    )


def _by_name(name: str, rows: Mapping[str, Mapping[str, object]]) -> Table:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    headings = (column.removesuffix("_bytes").replace("_", " ") for column in columns)
    return Table(
        columns=(name.replace("_", " "), *headings),
        rows=[
            Row(
                (
                    key,
                    *(_words(row[column], column) if column in row else "–" for column in columns),
                )
            )
            for key, row in rows.items()
        ],
    )


def _words(value: object, column: str = "") -> str:
    if isinstance(value, (bool, str)) or value is None:
        return {True: "yes", False: "no", None: "none"}.get(value, str(value))
    if isinstance(value, (int, float)):
        in_bytes = "bytes" in column and "per_s" not in column
        return wording.bytes_(value) if in_bytes else wording.number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items())
    if isinstance(value, Sequence):
        return ", ".join(_words(one) for one in value)
    return str(value)
