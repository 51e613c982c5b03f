"""Small files of the kernel (/proc, /sys, /etc) below a root; what cannot be read is None."""

from __future__ import annotations

import os
import re
from pathlib import Path

_LONGEST_BYTES = 65_536
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_LONGEST_LABEL = 200


class KernelFiles:
    """Reads below ``root``, which is / but in tests. Any thread; nothing raises."""

    def __init__(self, root: Path) -> None:
        """Read below ``root``; paths of the methods are relative to it."""
        self._root = str(root)

    def text(self, path: str) -> str | None:
        """Return the file's text (its first 64 KiB); None: not there, or not to be read."""
        try:
            # Not blocking: somebody may have put a pipe where a file is expected.
            file = os.open(f"{self._root}/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return os.read(file, _LONGEST_BYTES).decode(errors="replace")
            finally:
                os.close(file)
        except (OSError, ValueError):  # ValueError: a path made of a file's garbage
            return None

    def label(self, path: str) -> str | None:
        """Return the file's first words, printable and short; None where there are none."""
        return printable(self.text(path))

    def number(self, path: str) -> int | None:
        """Return the integer that the file holds; None where it holds anything else."""
        return integer(self.text(path))

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, in order; none where it is none."""
        try:
            return sorted(os.listdir(f"{self._root}/{folder}"))  # noqa: PTH208 (paths are text here)
        except (OSError, ValueError):
            return []

    def table(self, path: str) -> dict[str, str]:
        """Return a file's lines ``key: value`` or ``key value``; the first of a key counts."""
        found: dict[str, str] = {}
        for line in (self.text(path) or "").splitlines():
            key, _, value = line.replace(":", " ", 1).partition(" ")
            found.setdefault(key.strip(), value.strip())
        return found


def integer(text: str | None) -> int | None:
    """Return the integer that ``text`` is, of 19 digits at most; None where it is none."""
    found = _INTEGER.fullmatch(text.strip()) if text is not None else None
    return int(found.group()) if found else None


def printable(text: str | None) -> str | None:
    """Return ``text`` (a C string: up to its first NUL) fit for a message; None if it is empty."""
    if text is None:
        return None
    return _UNPRINTABLE.sub(" ", text.partition("\0")[0]).strip()[:_LONGEST_LABEL].strip() or None


def within(value: float | None, *, low: float, high: float) -> float | None:
    """Return ``value`` where a real sensor could say it, else None: that is no reading."""
    return float(value) if value is not None and low <= value <= high else None
