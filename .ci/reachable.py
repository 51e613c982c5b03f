"""Print the package index given as argument if it answers within a few seconds, else nothing.

pip itself would try an index out of reach for minutes.
"""

import sys
import urllib.request


def main() -> int:
    """Probe the one argument; an empty one is none."""
    index = sys.argv[1]
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=5):  # noqa: S310
            sys.stdout.write(index)
    except (OSError, ValueError):
        if index:
            sys.stderr.write(f"{index} cannot be reached: torch comes from pip's own index\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
