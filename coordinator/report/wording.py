"""Numbers as people read them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def bytes_(count: float | None) -> str:
    """Return ``12.3 MB``: three digits and a decimal unit."""
    if count is None or not math.isfinite(count):
        return "–"
    power = min(max(int(math.log10(abs(count)) / 3), 0), len(_UNITS) - 1) if count else 0
    value = count / 1000**power
    return f"{value:.{_decimals(value) if power else 0}f} {_UNITS[power]}"


def seconds(value: float | None) -> str:
    """Return ``0.25 s``, ``12.3 s``, ``4 min 10 s`` or ``3 h 20 min``."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 120:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def number(value: float | None) -> str:
    """Return three significant digits, and all of a whole number."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{_decimals(value)}f}" if abs(value) >= 1 else f"{value:.3g}"


def date(wall_s: float | None) -> str:
    """Return a date and time, UTC, of seconds since 1970."""
    if wall_s is None or not 0 <= wall_s < 2**40:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(wall_s))


def ranks(values: Iterable[int]) -> str:
    """Return ``8``, or ``4 to 16, mean 9.5`` where they differ."""
    known = sorted(values)
    if not known:
        return "none"
    if known[0] == known[-1]:
        return str(known[0])
    return f"{known[0]} to {known[-1]}, mean {number(sum(known) / len(known))}"


def shortened(name: str, length: int = 18) -> str:
    """Return a name that fits beside a chart: both its ends, for numbers stand last."""
    if len(name) <= length:
        return name
    tail = length // 2
    return f"{name[: length - tail - 1]}…{name[-tail:]}"


def _decimals(value: float) -> int:
    return max(0, 2 - int(math.log10(max(abs(value), 1))))
