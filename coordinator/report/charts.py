"""What a chart is made of: colours, lines, cells, and the legend that the page writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from coordinator.report.derived import Floats

INK, MUTED, GRID, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c"
"""Stand-ins: in the page these become CSS variables, which differ between light and dark."""
CSS_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"}

PALETTE = (
    *("#3b82f6", "#ea7317", "#16a34a", "#d6336c", "#8b5cf6"),
    *("#0d9488", "#a8842c", "#dc2626", "#7c8798", "#84a30f"),
)
"""Told apart, and seen, on white and on near-black."""
SAFE_PALETTE = tuple(PALETTE[i] for i in (0, 1, 2, 3, 7, 8))
"""Those of them that eyes with protan, deutan or tritan vision tell apart, too."""
_DASHES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend, which the page writes beneath the chart."""

    name: str
    colour: str
    dash: str = "solid"

    @property
    def css_colour(self) -> str:
        """The colour as CSS says it."""
        return (
            f"var(--{CSS_VARIABLES[self.colour]})" if self.colour in CSS_VARIABLES else self.colour
        )

    @property
    def css_dash(self) -> str:
        """The dash as CSS says it, which knows no dash-dot."""
        return self.dash if self.dash in ("solid", "dashed", "dotted") else "double"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawn chart: ``svg`` is safe to stand in a page as it is."""

    title: str
    svg: Markup
    keys: Sequence[Key] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series of points; ``steps`` keep each value until the next x.

    ``band``: lowest and highest y at each point, for a shade behind a line.
    """

    xs: Sequence[float]
    ys: Sequence[float]
    key: Key
    kind: Literal["line", "dots", "steps", "bars"] = "line"
    in_legend: bool = True
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What the two axes of a chart mean; ``whole_x``: only whole numbers are values of x.

    ``log``: of y. ``highest``: the largest y that is shown; None for all.
    """

    x: str
    y: str
    whole_x: bool = True
    from_zero: bool = False
    log: bool = False
    log_x: bool = False
    highest: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Cells of rows x columns; NaN stays empty."""

    rows: Sequence[str]
    columns: Sequence[str]
    values_RC: Floats
    x: str
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Pieces of time of one row of a timeline: ``spans`` (start, length) in one colour."""

    row: int
    spans: Sequence[tuple[float, float]]
    colour: str


def device_keys(devices: Sequence[str]) -> dict[str, Key]:
    """Return each device's colour and dash, the same in all charts."""
    return {
        name: Key(name, PALETTE[i % len(PALETTE)], _DASHES[i // len(PALETTE) % len(_DASHES)])
        for i, name in enumerate(devices)
    }
