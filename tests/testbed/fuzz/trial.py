"""One decoder under many payloads, in a process whose memory is limited: what came out of it."""

from __future__ import annotations

import logging
import random
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import memory_use
from shared.errors import HsplitError
from tests.testbed.fuzz.decoders import Take, all_decoders

WARM_UP = 200
MOST_PAYLOAD_S = 2.0
"""Of the processor: a busy machine makes no decoder slow."""
MOST_GROWTH_BYTES = 64 * 2**20
ADDRESS_SPACE_BYTES = 512 * 2**20
"""Beyond what the process has at its start: less than what hostile headers announce."""
MOST_FINDINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A payload that brought something else than an error of ours, as hexadecimal digits."""

    decoder: str
    error: str
    where: str
    payload: str


@dataclass(slots=True, kw_only=True)
class Trial:
    """``errors``: how many payloads each of our errors refused; all others were taken."""

    decoder: str
    payloads: int
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    growth_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def taken(self) -> int:
        """How many payloads were read without an error."""
        return self.payloads - self.errors.total() - len(self.findings)


def run(name: str, *, payloads: int, seed: int) -> Trial:
    """Give ``payloads`` payloads to one decoder. Limits this process for good."""
    logging.disable(logging.CRITICAL)
    trial = Trial(decoder=name, payloads=payloads)
    with tempfile.TemporaryDirectory() as temporary:
        scratch, place = Path(temporary, "seeds"), Path(temporary, "work")
        scratch.mkdir()
        place.mkdir()
        decoder = all_decoders(scratch)[name]
        take = decoder.open(place)
        rng = random.Random(f"{seed} {name}")
        _limit_memory()
        before = memory_use.resident_peak_bytes()
        for number in range(payloads):
            if number == WARM_UP:
                memory_use.trim()
                before = memory_use.resident_bytes()
                memory_use.forget_peak()
            payload = decoder.make(rng)
            _give(take, payload, trial)
            if len(trial.findings) == MOST_FINDINGS:
                trial.payloads = number + 1
                break
        trial.growth_bytes = max(0, memory_use.resident_peak_bytes() - before)
    return trial


def _give(take: Take, payload: bytes, trial: Trial) -> None:
    began_s = time.process_time()
    try:
        with _alarm():
            take(payload)
    except HsplitError as error:
        trial.errors[type(error).__name__] += 1
    except (Exception, MemoryError) as error:  # noqa: BLE001
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-4:][::-1])
        said = f"{type(error).__name__}: {error}"[:300]
        found = Finding(decoder=trial.decoder, error=said, where=where, payload=payload.hex())
        trial.findings.append(found)
    trial.slowest_s = max(trial.slowest_s, time.process_time() - began_s)


class TooSlowError(Exception):
    """A payload took longer than any may."""


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TooSlowError(f"more than {MOST_PAYLOAD_S} s")

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, MOST_PAYLOAD_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
