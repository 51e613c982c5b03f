"""Children of a probe that end as no good child does: ``python -m tests.support.probe_children``.

They read their spec as the real one does; its ``device_id`` says what becomes of them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from edge_agent.probe_spec import LINE, SPEC, ProbeLine
from shared.atomic import replace_file
from shared.errors import ConfigError, PlanError
from shared.protocol.profile import BlockPoint

MODULE = "tests.support.probe_children"
MIB = 2**20
STUCK = "HSPLIT_TEST_STUCK"
"""Names the file that gets the process id of a child that is stuck, if any."""


def point(blocks: int, sequences: int) -> BlockPoint:
    """Return a point of no machine."""
    return BlockPoint(
        blocks=blocks,
        adapter_parameters=1000 * blocks,
        sequences=sequences,
        length=8,
        forward_s=0.1 * blocks,
        backward_s=0.2 * blocks,
        peak_bytes=(400 + 10 * blocks * sequences) * MIB,
    )


def say(line: ProbeLine) -> None:
    os.write(1, LINE.dump_json(line, exclude_none=True) + b"\n")


def main() -> None:
    spec = SPEC.validate_json(sys.stdin.buffer.read())
    what, _, points = spec.device_id.partition("-")
    os.write(1, b"a library says hello\n")
    say(ProbeLine(runtime_bytes=max(300 * MIB, spec.program_bytes)))
    for number in range(int(points or 0)):
        say(ProbeLine(block=point(1 + number % 3, 1 + number // 3)))
    say(ProbeLine(attempt="3 blocks on 4 x 8 tokens"))
    os.write(1, b'{"block": {"blocks": 3')  # cut off in the middle of a line
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stuck":
        if STUCK in os.environ:
            replace_file(Path(os.environ[STUCK]), str(os.getpid()).encode())
        time.sleep(600)
    if what == "crashed":
        sys.exit("Traceback: the driver is broken")
    error = ConfigError("no such device") if what == "config" else PlanError("memory is full")
    say(ProbeLine())
    say(ProbeLine(failure=str(error)))
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
