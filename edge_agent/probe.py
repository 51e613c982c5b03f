"""``python -m edge_agent.probe``: measure the agent's own backend; `edge_agent.probing` starts it.

Reads a `ProbeSpec` from stdin, writes a `ProbeLine` to stdout as soon as it is known.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from edge_agent.backends import open_backend
from edge_agent.backends.base import Backend
from edge_agent.emulation import emulated, parse_emulation
from edge_agent.probe_run import ProbeRun
from edge_agent.probe_spec import LINE, SPEC, ProbeLine, ProbeSpec
from shared.clock import SystemClock
from shared.errors import HsplitError

_OOM_SCORE = Path("/proc/self/oom_score_adj")
_KILL_ME_FIRST = "1000"


def main() -> int:
    """Measure; return 0, or the exit code of the error that stopped it."""
    # Ctrl-C reaches every process of a terminal; this one ends when its parent kills it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        # Where the memory does not suffice, this process must die and not the agent.
        _OOM_SCORE.write_text(_KILL_ME_FIRST)
    spec = SPEC.validate_json(sys.stdin.buffer.read())
    try:
        ProbeRun(_open(spec), spec, clock=SystemClock(), say=_say).run()
    except HsplitError as error:
        _say(ProbeLine(failure=str(error)))
        return error.exit_code
    return 0


def _open(spec: ProbeSpec) -> Backend:
    backend = open_backend(spec.backend, device=spec.device, threads=spec.threads)
    return emulated(backend, parse_emulation(spec.emulate) if spec.emulate else None)


def _say(line: ProbeLine) -> None:
    # Unbuffered and in one write: the next point may be the last thing that this process does.
    os.write(sys.stdout.fileno(), LINE.dump_json(line, exclude_none=True) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
