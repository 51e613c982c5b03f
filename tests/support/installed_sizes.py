"""How much a package takes on disk with everything that it needs, where this runs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure_bytes(name: str, extra: str) -> int:
    """Return what a package with an extra takes, with all the packages that it needs."""
    return sum(_installed_bytes(one) for one in _closure(name, extra))


def _closure(name: str, extra: str) -> set[str]:
    """Return the installed packages that a package with an extra needs, itself included."""
    waiting, followed = [(name, extra)], set()
    while waiting:
        step = name, extra = waiting.pop()
        if step in followed:
            continue
        followed.add(step)
        for line in metadata.requires(name) or ():
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(one.name), more) for more in (*one.extras, "")]
    return {name for name, _ in followed}


def _installed_bytes(name: str) -> int:
    return sum(path.stat().st_size for path in _files(name) if path.is_file())


def _files(name: str) -> Iterator[Path]:
    for file in metadata.files(name) or ():
        yield Path(str(file.locate()))
