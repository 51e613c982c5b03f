"""A child process that exports a run's graphs while the coordinator goes on with its rounds."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from pydantic import TypeAdapter

from coordinator.graphs.spec import GraphSpec
from shared.clock import Clock

MODULE = "coordinator.graphs.program"
SPEC: TypeAdapter[GraphSpec] = TypeAdapter(GraphSpec)
LIMIT_S: Final = 1800.0
"""A model with many kinds of blocks takes minutes; this long nothing takes that will ever end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How an export went: how long it took, and why it failed, if it did."""

    took_s: float
    failure: str | None


class Export:
    """One export from its start to its end; nothing here waits. Belongs to the owner's thread."""

    def __init__(self, spec: GraphSpec, folder: Path, clock: Clock) -> None:
        """Start the child, which writes ``folder``.

        Raises:
            OSError: it cannot be started.
        """
        self._clock = clock
        self._began_s = clock.monotonic_s()
        # Files, not pipes: neither side ever waits for the other to read or write.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        try:
            self.process = _started(spec, folder, errors=self._errors)
        except OSError:
            self._errors.close()
            raise

    def ended(self) -> Ended | None:
        """Return how it went, once the child is no more; None while it works."""
        took_s = self._clock.monotonic_s() - self._began_s
        if self.process.poll() is None and took_s < LIMIT_S:
            return None
        code = self.process.poll()
        failure = None if code == 0 else self._complaint(code)
        self.close()
        return Ended(took_s, failure)

    def close(self) -> None:
        """End the child if it still works. May be called twice."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._errors.close()

    def _complaint(self, code: int | None) -> str:
        if code is None:
            return f"it took more than {LIMIT_S:g} s"
        if code == -signal.SIGKILL:
            return "the system killed it: the memory is full"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return said[-1][:1000] if said else f"it ended with {code}, without a word"


def _started(spec: GraphSpec, folder: Path, *, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as told:
        told.write(SPEC.dump_json(spec))
        told.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, str(folder.absolute())],
            # The module must be found wherever this program was started.
            cwd=Path(__file__).resolve().parents[2],
            stdin=told,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
