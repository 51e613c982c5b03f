"""Charts as SVG that stands in an HTML page and follows its light or dark colours.

Figures are matplotlib's, without pyplot and its global state. They are narrow, so that their
words can be read on a phone, where the page shows them at their own size.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from coordinator.report.charts import (
    CSS_VARIABLES,
    GRID,
    INK,
    MUTED,
    SURFACE,
    Bars,
    Chart,
    Grid,
    Key,
    Line,
    Scale,
)
from coordinator.report.derived import Floats, thinned
from coordinator.report.line_names import name_ends
from coordinator.report.wording import number, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

WIDTH_INCHES = 4.4
_HEIGHT_INCHES = 2.5
_NAMED_HEIGHT_INCHES = 3.2
_MOST_POINTS = 600
_MOST_MARKERS = 40
_MOST_LETTERED_COLUMNS = 12
_MOST_TICKS = 12

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # words stay words: the page's own font, found by a search
    "svg.hashsalt": "hsplit",  # equal files make equal pages
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the page's style meanwhile: matplotlib's settings are the process's."""
    # It takes most of a second to import, and most commands draw nothing.
    import matplotlib as mpl  # noqa: PLC0415

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A font without some letter, an axis without extent: neither spoils a page.
        warnings.simplefilter("ignore")
        yield


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    scale: Scale,
    note: str = "",
    named: bool = False,
) -> Chart | None:
    """Return a chart of the lines that have a finite point; None where there is none.

    ``named``: each line's name stands at its end, in place of a legend; the chart is taller.
    """
    drawn = [line for line in lines if np.isfinite(np.asarray(line.ys, dtype=float)).any()]
    if not drawn:
        return None
    figure, axes = _axes(_NAMED_HEIGHT_INCHES if named else _HEIGHT_INCHES)
    for line in drawn:
        _draw(axes, line)
    _scale_axes(axes, scale)
    if scale.highest is not None:
        _cut_off(axes, drawn, highest=scale.highest)
    if named:
        name_ends(axes, drawn)
    in_legend = len(drawn) > 1 and not named
    keys = tuple(line.key for line in drawn if line.in_legend) if in_legend else ()
    return Chart(title=title, svg=_svg(figure), keys=keys, note=note)


def grid_chart(title: str, grid: Grid, *, note: str = "") -> Chart | None:
    """Return a heat map; None where no cell has a value. Few cells are lettered."""
    finite = grid.values_RC[np.isfinite(grid.values_RC)]
    if not finite.size:
        return None
    rows, columns = grid.values_RC.shape
    figure, axes = _axes(0.75 + _row_inches(rows) * rows)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid.values_RC),
        norm=_norm(finite, log=grid.log),
        cmap=_colours(),
        edgecolors=SURFACE,
        linewidth=0.8 if columns <= 2 * _MOST_TICKS else 0.2,
    )
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(rows) + 0.5, [shortened(row) for row in grid.rows])
    every = math.ceil(columns / _MOST_TICKS)
    axes.set_xticks(np.arange(columns)[::every] + 0.5, list(grid.columns)[::every])
    axes.tick_params(length=0)
    axes.set_xlabel(grid.x)
    if columns <= _MOST_LETTERED_COLUMNS:
        _letter(axes, grid.values_RC, mesh)
    else:
        _add_colour_bar(figure, axes, mesh)
    return Chart(title=title, svg=_svg(figure), note=note)


def timeline_chart(
    title: str,
    rows: Sequence[str],
    bars: Sequence[Bars],
    *,
    x: str,
    keys: Sequence[Key],
    note: str = "",
) -> Chart | None:
    """Return a chart of what each row did when; None where nobody did anything."""
    if not any(bar.spans for bar in bars):
        return None
    figure, axes = _axes(0.7 + _row_inches(len(rows)) * len(rows))
    for bar in bars:
        axes.broken_barh(list(bar.spans), (bar.row - 0.36, 0.72), facecolors=bar.colour)
    axes.set_yticks(range(len(rows)), [shortened(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.01)
    axes.set_xlabel(x)
    return Chart(title=title, svg=_svg(figure), keys=tuple(keys), note=note)


def _axes(height_inches: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - as in `style`

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _row_inches(rows: int) -> float:
    return 0.24 if rows <= _MOST_TICKS else 0.165


def _draw(axes: Axes, line: Line) -> None:
    key = line.key
    xs, ys = thinned(line.xs, line.ys, at_most=_MOST_POINTS)
    looks: dict[str, Any] = {"color": key.colour, "linestyle": key.dash}
    if line.band is not None:
        low, high = (thinned(line.xs, edge, at_most=_MOST_POINTS)[1] for edge in line.band)
        axes.fill_between(xs, low, high, color=key.colour, alpha=0.16, linewidth=0)
    if line.kind == "bars":
        axes.bar(xs, ys, width=_bar_width(xs), color=key.colour)
    elif line.kind == "dots":
        axes.plot(xs, ys, color=key.colour, linestyle="none", marker=".", markersize=2.5, alpha=0.6)
    elif line.kind == "steps":
        axes.step(xs, ys, where="post", **looks)
    else:
        axes.plot(xs, ys, marker="o" if len(xs) <= _MOST_MARKERS else "", **looks)


def _bar_width(xs: Floats) -> float:
    return 0.8 * float(np.diff(xs).min()) if len(xs) > 1 and np.diff(xs).min() > 0 else 0.8


def _scale_axes(axes: Axes, scale: Scale) -> None:
    from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator  # noqa: PLC0415

    axes.set_xlabel(scale.x)
    axes.set_ylabel(scale.y)
    if scale.whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if scale.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.7)))
    elif scale.from_zero:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.03)
    if scale.log_x:
        _scale_log_x(axes)
    for axis, unit in ((axes.xaxis, scale.x), (axes.yaxis, scale.y)):
        if unit == "bytes":
            axis.set_major_formatter(EngFormatter("B"))


def _scale_log_x(axes: Axes) -> None:
    """Make x logarithmic, with as many numbers as there is room for beneath."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _cut_off(axes: Axes, lines: Sequence[Line], *, highest: float) -> None:
    """Show no y above ``highest``, and no emptiness below the lowest."""
    ys = [np.asarray(edge, dtype=float) for line in lines for edge in (line.ys, *(line.band or ()))]
    shown = [y[np.isfinite(y) & (y < highest)] for y in ys]
    lowest = min((float(y.min()) for y in shown if y.size), default=highest)
    if lowest < highest:
        scale = axes.yaxis.get_transform()
        low, high = scale.transform([lowest, highest])
        (bottom,) = scale.inverted().transform([low - 0.04 * (high - low)])
        axes.set_ylim(float(bottom), highest)


def _norm(finite: Floats, *, log: bool) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize  # noqa: PLC0415 - as in `style`

    low, high = float(finite.min()), float(finite.max())
    if log and low > 0 and high > 10 * low:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1)


def _colours() -> Colormap:
    """Return the colours of heat maps: few, or matplotlib makes a bitmap of the colour bar."""
    from matplotlib import colormaps  # noqa: PLC0415 - as in `style`

    return colormaps["viridis"].resampled(48)


def _add_colour_bar(figure: Figure, axes: Axes, mesh: QuadMesh) -> None:
    slim = figure.get_size_inches()[1] / 0.14
    bar = figure.colorbar(
        mesh, ax=axes, pad=0.02, aspect=slim, format=lambda value, _: number(value)
    )
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _letter(axes: Axes, values_RC: Floats, mesh: QuadMesh) -> None:
    for (row, column), value in np.ndenumerate(values_RC):
        if math.isfinite(value):
            red, green, blue, _ = mesh.to_rgba(np.array([value]))[0]
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            colour = "black" if light else "white"
            words = number(value)
            axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", color=colour)


def _svg(figure: Figure) -> Markup:
    """Return a figure as an ``<svg>`` element without size, names or fixed colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every figure has an axes_1
    for colour, name in CSS_VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)  # noqa: S704 - matplotlib escaped every word in it
