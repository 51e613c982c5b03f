"""Whether a program still makes progress: it writes a small file, ``health`` commands read it."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.atomic import replace_file
from shared.clock import Clock
from shared.errors import StorageError, UnhealthyError

logger = logging.getLogger(__name__)

FILE_NAME = "health.json"

_LEAST_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Health:
    """What a program last said of itself.

    ``progress_monotonic_s`` is the machine's monotonic clock (the same in every process since
    the machine started), ``progress_wall_s`` seconds since 1970, for people.
    """

    pid: int
    phase: str
    progress_monotonic_s: float
    progress_wall_s: float


_MOST_S = 1e12
_MOST_PROCESSES = 2**31


class HealthFile:
    """Writes one program's health. Belongs to the thread that makes the progress."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Write the first state, ``starting``.

        Raises:
            StorageError: the folder cannot be written; better known now than in an hour.
        """
        self._path = path
        self._clock = clock
        self._phase = ""
        self._written_s = 0.0
        self._failed = False
        self._write("starting", clock.monotonic_s())

    def progress(self, phase: str) -> None:
        """Note that something went forward in ``phase`` (``training``, say).

        Writes at most once a second while the phase stays. A full disk is logged once and
        does not stop the program: its work may well go on in memory.
        """
        now_s = self._clock.monotonic_s()
        if phase == self._phase and now_s - self._written_s < _LEAST_INTERVAL_S:
            return
        try:
            self._write(phase, now_s)
            self._failed = False
        except StorageError as error:
            if not self._failed:
                logger.warning("health is no longer reported: %s", error)
            self._failed = True

    def close(self) -> None:
        """Take the file away: a program that has ended is neither well nor stuck."""
        self._path.unlink(missing_ok=True)

    def _write(self, phase: str, now_s: float) -> None:
        health = Health(os.getpid(), phase, now_s, self._clock.wall_s())
        self._phase, self._written_s = phase, now_s
        replace_file(self._path, json.dumps(asdict(health)).encode(), durable=False)


def check(path: Path, *, max_age_s: float, clock: Clock) -> Health:
    """Return the health of the program that writes ``path``.

    Raises:
        UnhealthyError: it is not running, or made no progress for more than ``max_age_s``.
    """
    health = _read(path)
    age_s = clock.monotonic_s() - health.progress_monotonic_s
    if age_s < 0 or not _is_alive(health.pid):
        # A negative age: the machine was started again since the file was written.
        raise UnhealthyError(f"{path}: process {health.pid} stopped in phase {health.phase}")
    if age_s > max_age_s:
        raise UnhealthyError(
            f"{path}: process {health.pid} made no progress for {age_s:.0f} s in phase "
            f"{health.phase} (allowed: {max_age_s:.0f} s); see its log, and restart it"
        )
    return health


def _read(path: Path) -> Health:
    try:
        health = Health(**json.loads(path.read_bytes()))
        numbers = (health.progress_monotonic_s, health.progress_wall_s)
        if type(health.pid) is not int or not all(0 <= n < _MOST_S for n in numbers):
            raise TypeError("pid and times are numbers")  # and no NaN, which is of no age
        if not 0 < health.pid < _MOST_PROCESSES:
            raise ValueError(f"{health.pid} is no process")
        return health
    except OSError as error:
        raise UnhealthyError(f"{path} cannot be read, so nothing runs there: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UnhealthyError(f"{path} is no health file: {error}") from error


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it exists, and belongs to another user
    return True
