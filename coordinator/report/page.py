"""One HTML page that needs no other file: figures, sections of charts and tables, dark or light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from coordinator.report.charts import Chart, Key
from shared import version


@dataclass(frozen=True, slots=True)
class Row:
    """A table's row; ``why`` are words that stand beneath it."""

    cells: Sequence[str]
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Words in rows and columns; a newline breaks a heading. ``note`` stands beneath."""

    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page. ``keys``: the legend of all its charts."""

    title: str
    charts: Sequence[Chart] = ()
    text: str = ""
    keys: Sequence[Key] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()
    """Sentences that stand as a list."""


def render(
    name: str,
    sections: Sequence[Section],
    *,
    subtitle: str,
    headline: Sequence[tuple[str, str]],
    made_from: str,
) -> str:
    """Return the page. ``headline``: figures that stand first, each with its name.

    Whatever is in names and words, the template escapes it, as matplotlib does in charts.
    """
    return _template().render(
        name=name,
        subtitle=subtitle,
        headline=headline,
        sections=sections,
        made_from=made_from,
        version=version.VERSION,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja")
