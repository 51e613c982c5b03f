"""Both programs as processes that start in milliseconds, since their imports are done already.

One process (multiprocessing's fork server) imports everything and then only forks. A program is a
process of its own: it runs the real ``main`` with real arguments, its output goes to a file, and
it ends by any signal. Beside a console script only this is other: what is registered with
`atexit` does not run at its end, it dies with whoever started it, and there is no matplotlib, so a
run ends without its page (which would take longer than the run).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.testbed.chaos import clocks
from tests.testbed.system import ROOT

MAIN = {"coordinator": "coordinator.cli", "agent": "edge_agent.cli"}
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}
_DIE_WITH_PARENT = 1


class Program:
    """A process of ours: `code` is None until it has ended."""

    def __init__(self, name: str, process: multiprocessing.context.ForkServerProcess, log: Path):
        self.name = name
        self.log = log
        self._process = process

    @property
    def code(self) -> int | None:
        """The exit code, or minus the signal that killed it."""
        return self._process.exitcode

    @property
    def runs(self) -> bool:
        return self.code is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.runs and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end; return the exit code, None where it did not come."""
        self._process.join(timeout_s)
        return self.code

    def close(self) -> None:
        """Kill it and whatever it started."""
        pid = self._process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid is not None and self.runs:
                os.killpg(pid, signal.SIGKILL)
        self.send(signal.SIGKILL)
        self.wait(30)

    def text(self) -> str:
        """Return what it wrote so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Starter:
    """Starts programs; the first start of a process takes the seconds of all imports."""

    def __init__(self) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.testbed.chaos.preload"])

    def start(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        name: str,
        log: Path,
        environment: Mapping[str, str],
    ) -> Program:
        """Start ``coordinator`` or ``agent``; its output is appended to ``log``."""
        process = self._context.Process(
            target=_main, args=(program, list(arguments), str(log), dict(environment)), name=name
        )
        library = clocks.preloaded()
        with _in_environment(QUIET if library is None else {**QUIET, "LD_PRELOAD": library}):
            process.start()
        return Program(name, process, log)


@contextlib.contextmanager
def _in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Let the fork server inherit these: its numpy reads them while it is imported."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _main(program: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    # The fork server lives as long as anybody holds this: let that be who starts programs alone.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    sys.argv = [f"hsplit-{program}", *arguments]
    sys.exit(importlib.import_module(MAIN[program]).main(arguments))
