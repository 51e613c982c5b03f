"""A program that has its device measured by a stuck child, and stops as both programs do.

Reads its spec as a child does. Once the child is stuck, its process id is in the file that the
environment variable `probe_children.STUCK` names.
"""

from __future__ import annotations

import sys

from edge_agent import probing
from edge_agent.probe_spec import SPEC
from shared import program
from tests.support.probe_children import MODULE


def main() -> None:
    spec = SPEC.validate_json(sys.stdin.buffer.read())
    probing.MODULE = MODULE
    sys.exit(program.exit_code(lambda: len(probing.probe(spec).blocks)))


if __name__ == "__main__":
    main()
