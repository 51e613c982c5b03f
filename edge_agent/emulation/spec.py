"""Which smaller device to play: ``memory=2GiB,speed=0.25,uplink=10Mbit/s,latency=20ms``.

Any subset of the parts, in any order. What is not named stays as this machine has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from shared.config import MemoryLimit
from shared.errors import ConfigError

EXAMPLE = "memory=2GiB,speed=0.25,uplink=10Mbit/s,downlink=50Mbit/s,latency=20ms"
LONGEST_LATENCY_S = 60.0
FASTEST_BYTES_PER_S = 1e15

_QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z/]*)")
# Case counts: Mb/s is a megabit to some and a megabyte to others, so it is neither here.
_BYTES_PER_S = {
    **{f"{prefix}bit/s": 1000**power / 8 for power, prefix in enumerate(("", "k", "M", "G"))},
    **{f"{prefix}B/s": 1000.0**power for power, prefix in enumerate(("", "k", "M", "G"))},
    **{f"{prefix}B/s": 1024.0**power for power, prefix in enumerate(("Ki", "Mi", "Gi"), 1)},
}
_SECONDS = {"ms": 1e-3, "s": 1.0}
_MEMORY: TypeAdapter[int] = TypeAdapter(MemoryLimit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """A smaller device than this machine. None, or 1 and 0: as the machine is.

    ``memory_bytes``: what the whole program may take, Python and its libraries included.
    ``speed``: how fast it computes, as a share of this machine. ``latency_s``: one way between
    device and broker, so a round trip is longer by twice as much.
    """

    memory_bytes: int | None = None
    speed: float = 1.0
    uplink_bytes_per_s: float | None = None
    downlink_bytes_per_s: float | None = None
    latency_s: float = 0.0

    @property
    def shapes_link(self) -> bool:
        """Whether the link is another than the machine's own."""
        rates = (self.uplink_bytes_per_s, self.downlink_bytes_per_s)
        return self.latency_s > 0 or any(rate is not None for rate in rates)

    def __str__(self) -> str:
        """Say what is emulated, for a log line."""
        parts = []
        if self.memory_bytes is not None:
            parts.append(f"{self.memory_bytes / 2**20:.0f} MiB of memory")
        if self.speed < 1:
            parts.append(f"{self.speed:g} of this machine's speed")
        for name, rate in (("up", self.uplink_bytes_per_s), ("down", self.downlink_bytes_per_s)):
            if rate is not None:
                parts.append(f"{rate * 8e-6:g} Mbit/s {name}")
        if self.latency_s:
            parts.append(f"{self.latency_s * 1e3:g} ms of latency each way")
        return ", ".join(parts) or "this machine as it is"


def parse_emulation(text: str) -> Emulation:
    """Return what a specification like `EXAMPLE` says.

    Raises:
        ConfigError: names the part that is wrong, and what it may be.
    """
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in _PARTS:
            known = ", ".join(_PARTS)
            raise ConfigError(f"{part.strip()!r} is no part of it: choose of {known}, as {EXAMPLE}")
        field, read = _PARTS[name]
        if field in values:
            raise ConfigError(f"{name} is given twice; remove one")
        try:
            values[field] = read(value)
        except ValueError as error:
            raise ConfigError(f"{name}={value}: {error}") from error
    return Emulation(**values)


def _memory(text: str) -> int:
    try:
        return int(_MEMORY.validate_python(text))
    except ValidationError as error:
        raise ValueError("choose a size of at least 1 MiB, such as 2GiB or 800MB") from error


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed <= 1:
        raise ValueError("choose a number above 0 up to 1, the share of this machine's speed")
    return speed


def _rate(text: str) -> float:
    number, factor = _quantity(text, _BYTES_PER_S)
    if not 0 < number * factor < FASTEST_BYTES_PER_S:
        raise ValueError("choose a rate above 0; to leave the link as it is, leave this part out")
    return number * factor


def _latency(text: str) -> float:
    number, factor = _quantity(text, _SECONDS)
    if number * factor > LONGEST_LATENCY_S:
        raise ValueError(f"choose at most {LONGEST_LATENCY_S:g}s")
    return number * factor


def _quantity(text: str, units: dict[str, float]) -> tuple[float, float]:
    found = _QUANTITY.fullmatch(text)
    if found is None or found[2] not in units:
        raise ValueError(f"choose a number and one of these units: {', '.join(units)}")
    return float(found[1]), units[found[2]]


_PARTS: dict[str, tuple[str, Callable[[str], float]]] = {
    "memory": ("memory_bytes", _memory),
    "speed": ("speed", _speed),
    "uplink": ("uplink_bytes_per_s", _rate),
    "downlink": ("downlink_bytes_per_s", _rate),
    "latency": ("latency_s", _latency),
}
