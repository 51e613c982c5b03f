"""``python -m coordinator.graphs.program FOLDER``: export the graphs of one `GraphSpec`.

Reads the spec from stdin as JSON. What stopped it is its exit code and the last line of stderr;
`coordinator.graphs.exporting` starts it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from coordinator.graphs import stored
from coordinator.graphs.export import export_graphs
from coordinator.graphs.exporting import SPEC
from shared.errors import HsplitError

NICENESS = 10
"""The coordinator computes on the same cores, and devices wait for that."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export; return 0, or the exit code of the error that stopped it."""
    # Ctrl-C reaches every process of a terminal; this one ends when its parent kills it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    (folder,) = sys.argv[1:] if argv is None else argv
    spec = SPEC.validate_json(sys.stdin.buffer.read())
    try:
        stored.save(Path(folder), export_graphs(spec))
    except HsplitError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
