"""One decoder under atheris, which keeps what reaches new code and changes that further.

python -m tests.testbed.fuzz.guided "codec ready" 10     the decoder's name, and for how long
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shared", "coordinator", "edge_agent"]):
    from shared.errors import HsplitError
    from tests.testbed.fuzz.decoders import all_decoders

SEEDS = 100


def main() -> None:
    """Search until the time is over; libFuzzer ends the process, with 0 if it found nothing."""
    name, seconds = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    temporary = Path(tempfile.mkdtemp())
    for folder in ("seeds", "work", "corpus"):
        (temporary / folder).mkdir()
    decoder = all_decoders(temporary / "seeds")[name]
    take = decoder.open(temporary / "work")
    rng = random.Random(name)
    for number in range(SEEDS):
        (temporary / "corpus" / str(number)).write_bytes(decoder.make(rng))

    def one(payload: bytes) -> None:
        try:
            take(payload)
        except HsplitError:
            return

    options = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=1024"]
    options += [f"-artifact_prefix={temporary}/"]
    atheris.Setup([sys.argv[0], *options, str(temporary / "corpus")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
