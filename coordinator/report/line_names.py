"""Names at the ends of a chart's lines, moved apart where they would lie on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from coordinator.report.charts import Line
from coordinator.report.wording import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP = 0.062
"""Between two names, as a share of a chart's height: a line of words."""


def name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name to the right of the chart, tied to the line's last point."""
    named = [line for line in lines if line.key.name]
    ends = [_end(axes, line) for line in named]
    heights = spread([height for _, height in ends], gap=_GAP)
    for line, (end, _), height in zip(named, ends, heights, strict=True):
        axes.annotate(
            shortened(line.key.name),
            xy=end,
            xytext=(1.05, height),
            textcoords="axes fraction",
            color=line.key.colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.key.colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),  # from the name's beginning
                "shrinkA": 2,
                "shrinkB": 2,
            },
        )


def spread(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Return places in [0, 1] near those wanted, in the same order and ``gap`` apart.

    Equal gaps over the whole where so many do not fit.
    """
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    places = np.clip(np.asarray(wanted, dtype=np.float64)[order], 0, 1)
    for i in range(1, len(places)):  # up, where the one below is too near
        places[i] = max(places[i], places[i - 1] + gap)
    highest = 1.0
    for i in reversed(range(len(places))):  # and down again, from what is above the top
        places[i] = highest = min(places[i], highest)
        highest -= gap
    back = np.empty_like(places)
    back[order] = places
    return [float(place) for place in back]


def _end(axes: Axes, line: Line) -> tuple[tuple[float, float], float]:
    """Return a line's last point, and its height as a share of the chart's."""
    xs, ys = np.asarray(line.xs, dtype=np.float64), np.asarray(line.ys, dtype=np.float64)
    last = np.flatnonzero(np.isfinite(ys))[-1]
    low, high = axes.get_ylim()
    seen = float(np.clip(ys[last], low, high))
    _, height = axes.transAxes.inverted().transform(axes.transData.transform((xs[last], seen)))
    return (float(xs[last]), seen), float(height)
