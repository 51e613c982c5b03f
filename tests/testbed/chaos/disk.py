"""A disk so small that a test can fill it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SIZE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Disk:
    """A file system of its own, mounted at ``folder``."""

    folder: Path

    @property
    def _filler(self) -> Path:
        return self.folder / "filler"

    def fill(self) -> None:
        """Take all the room that is left."""
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass

    def clear(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """Mount a tmpfs at an empty folder.

    Raises:
        OSError: this machine does not let us.
    """
    _command("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "chaos", str(folder))
    try:
        yield Disk(folder)
    finally:
        _command("umount", "--lazy", str(folder))


def why_no_disk(folder: Path) -> str | None:
    """Return why this machine lets nobody mount a small disk; None where it does."""
    try:
        with small_disk(folder):
            return None
    except OSError as error:
        return str(error)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{words[0]} is not allowed here: {done.stderr.strip()}")
