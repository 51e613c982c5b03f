"""Hostile payloads for every decoder: only our errors may come out, within bounds.

make fuzz                                      at least 100,000 payloads per decoder
python -m tests.testbed.fuzz.campaign --payloads 500 --decoders chunking checkpoint

Payloads are real ones, changed (`mutations`), and noise; the seed decides them. Where atheris is
installed, each decoder is then driven towards code that no payload has reached yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.testbed.bench_report import write_report
from tests.testbed.fuzz import trial
from tests.testbed.fuzz.decoders import all_decoders
from tests.testbed.fuzz.trial import Finding, Trial

ENOUGH = 100_000
HEAD = f"{'decoder':28}{'payloads':>9}{'taken':>8}{'slowest ms':>12}{'peak MiB':>10}  refused with"


def campaign(
    names: Sequence[str],
    *,
    payloads: int,
    seed: int,
    processes: int,
    apart: bool = True,
    show: bool = True,
) -> list[Trial]:
    """Try every named decoder, ``apart``: each in a process of its own; say how each fared."""
    if show:
        print(HEAD)
    trials = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1 if apart else None) as pool:
        work = partial(trial.run, payloads=payloads, seed=seed)
        for one in pool.imap(work, names, chunksize=1):
            trials.append(one)
            if show:
                print(line(one), flush=True)
    return trials


def names_like(parts: Sequence[str]) -> list[str]:
    """Return the decoders whose names hold one of ``parts``; all where there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        names = list(all_decoders(Path(scratch)))
    return [name for name in names if not parts or any(part in name for part in parts)]


def line(one: Trial) -> str:
    """Return one decoder's line of the table."""
    errors = ", ".join(f"{name} {count}" for name, count in one.errors.most_common())
    return (
        f"{one.decoder:28}{one.payloads:>9}{one.taken:>8}{one.slowest_s * 1e3:>12.1f}"
        f"{one.growth_bytes / 2**20:>10.1f}  {errors}"
        + "".join(f"\n    FOUND {found.error} ({found.where})" for found in one.findings)
    )


def over_the_limits(one: Trial) -> list[str]:
    """Return what is wrong with a trial, in words."""
    wrong = [f"{one.decoder}: {found.error} at {found.where}" for found in one.findings]
    if one.slowest_s > trial.MOST_PAYLOAD_S:
        wrong.append(f"{one.decoder}: {one.slowest_s:.1f} s for one payload")
    if one.growth_bytes > trial.MOST_GROWTH_BYTES:
        wrong.append(f"{one.decoder}: grew by {one.growth_bytes / 2**20:.0f} MiB")
    return wrong


def vars_of(one: Trial) -> dict[str, Any]:
    """Return a trial's figures as JSON can hold them."""
    # A Counter is no dataclass field that `asdict` could copy.
    return asdict(replace(one, errors={})) | {"errors": dict(one.errors)}


def coverage_guided(names: Sequence[str], *, seconds: int) -> list[Finding]:
    """Drive each decoder with atheris; say so where that is not here."""
    if importlib.util.find_spec("atheris") is None:
        print("NOTE: no atheris for this Python, so no coverage-guided search was made")
        return []
    findings = []
    for name in names:
        command = [sys.executable, "-m", "tests.testbed.fuzz.guided", name, str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        runs = [one for one in done.stderr.splitlines() if one.startswith("Done ")]
        print(f"{name:28}atheris: {runs[-1] if runs else 'stopped'}", flush=True)
        if done.returncode:
            said = done.stdout[-3000:] + done.stderr[-3000:]
            print(said)
            findings.append(Finding(decoder=name, error=said, where="atheris", payload=""))
    return findings


def main() -> int:
    """Run what is asked for; write the figures; fail where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--payloads", type=int, default=ENOUGH, help="per decoder")
    parser.add_argument("--decoders", nargs="*", default=(), help="parts of their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--guided-seconds", type=int, default=10, help="per decoder; 0: none")
    options = parser.parse_args()
    names = names_like(options.decoders)
    trials = campaign(
        names, payloads=options.payloads, seed=options.seed, processes=options.processes
    )
    guided = (
        coverage_guided(names, seconds=options.guided_seconds) if options.guided_seconds else []
    )
    rows = [{**vars_of(one), "taken": one.taken} for one in trials]
    found = {"trials": rows, "guided": [asdict(one) for one in guided], "seed": options.seed}
    write_report("fuzz", found)
    wrong = [words for one in trials for words in over_the_limits(one)]
    print("\n".join(wrong) or f"{len(trials)} decoders: only our errors, within the bounds")
    return 1 if wrong or guided else 0


if __name__ == "__main__":
    sys.exit(main())
