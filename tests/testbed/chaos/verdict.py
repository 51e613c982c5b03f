"""What must hold after every run, whatever happened to it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.state.database import STATE_FILE
from tests.support.closeness import largest, relative
from tests.support.outcomes import TOLERANCE
from tests.testbed import small_run
from tests.testbed.chaos.bed import COORDINATOR, ROUNDS, RUN_FAILED, STEPS
from tests.testbed.chaos.faults import DISK_FULL
from tests.testbed.chaos.ledger import AcceptedRound, accepted_rounds, repeated_rounds
from tests.testbed.chaos.replay import MiscountedError, Replay
from tests.testbed.chaos.trial import Trial

KILLED, TERMINATED, TERMINATED_AT_ONCE = -9, 143, -15
ON_PURPOSE = {0, KILLED, TERMINATED, TERMINATED_AT_ONCE}
"""At once: before the program had got as far as to take SIGTERM itself."""
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Verdict:
    """``wrong``: in words, nothing where all is well. ``difference``: from the replayed run.

    ``dropped``: how often a device did not deliver in a round that counts; ``repeated``: rounds
    that began again.
    """

    wrong: tuple[str, ...]
    difference: float | None = None
    dropped: int = 0
    repeated: int = 0


def judge(trial: Trial, texts: Path) -> Verdict:
    """Look at what a run left behind; ``texts``: the devices' own."""
    wrong = [*trial.notes, *_of_exit_codes(trial)]
    if trial.codes[COORDINATOR] != 0:
        return Verdict(tuple(wrong))
    database = trial.outcome / STATE_FILE
    rounds = accepted_rounds(database)
    lines = _lines(trial.outcome)
    repeated = repeated_rounds(database)
    wrong += [*_of_metrics(lines), *_of_what_was_kept(trial), *_of_books(rounds)]
    wrong += _of_tokens(rounds, lines, trial.outcome)
    dropped = sum(not share.delivered for one in rounds for share in one.shares.values())
    if wrong:
        return Verdict(tuple(wrong), None, dropped, repeated)
    try:
        apart = difference(trial.outcome, texts, rounds)
    except MiscountedError as error:
        return Verdict((str(error),), None, dropped, repeated)
    most = TOLERANCE[trial.schedule.optimizer]
    if not apart <= most:
        wrong.append(f"the adapters differ by {apart:.1e} from the replayed run's")
    return Verdict(tuple(wrong), apart, dropped, repeated)


def difference(outcome: Path, texts: Path, rounds: Sequence[AcceptedRound]) -> float:
    """Return the largest relative difference of any module's exported update to the replayed.

    Raises:
        MiscountedError: as `Replay`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        replayed = Replay(outcome, texts, Path(scratch)).run(rounds)
    exported = small_run.updates(outcome / "adapter")
    expected = {PREFIX + name: update for name, update in replayed.items()}
    if exported.keys() != expected.keys():
        raise MiscountedError(f"exported are {sorted(exported)}, trained {sorted(expected)}")
    return largest(relative(exported[name], one) for name, one in expected.items())


def _of_exit_codes(trial: Trial) -> Iterator[str]:
    failed = "disk full" in trial.struck
    if trial.codes[COORDINATOR] is None:
        yield f"the run has not ended after {trial.seconds:.0f} s"
        return
    if trial.codes[COORDINATOR] != 0:
        yield f"the coordinator ended with {trial.codes[COORDINATOR]}"
    for name, code in (*trial.ended, *trial.codes.items()):
        of_failure = DISK_FULL if name == COORDINATOR else RUN_FAILED
        if code not in ON_PURPOSE and not (failed and code == of_failure):
            yield f"{name} ended with {code}"


def _of_metrics(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    trained = [line["step"] for line in lines if "train/loss" in line]
    if trained != list(range(1, ROUNDS * STEPS + 1)):
        yield f"metrics.jsonl has the steps {trained}"
    closed = [line["round"] for line in lines if "round/seconds" in line]
    if closed != list(range(1, ROUNDS + 1)):
        yield f"metrics.jsonl has the rounds {closed}"


def _of_what_was_kept(trial: Trial) -> Iterator[str]:
    final = (trial.outcome / "metrics.jsonl").read_text().splitlines()
    for step, kept in trial.kept.items():
        if len(kept) != step:
            yield f"{step} steps were in a checkpoint, and {len(kept)} in metrics.jsonl"
        if not set(kept) <= set(final):
            yield f"of the {step} steps that a checkpoint held, some were taken anew"


def _of_books(rounds: Sequence[AcceptedRound]) -> Iterator[str]:
    if [one.number for one in rounds] != list(range(1, ROUNDS + 1)):
        yield f"the books have the rounds {[one.number for one in rounds]}"
    for one in rounds:
        steps = set(range((one.number - 1) * STEPS, one.number * STEPS))
        if set().union(*(share.tokens for share in one.shares.values())) != steps:
            yield f"the books of round {one.number} lack a step"
        for device, share in one.shares.items():
            if share.delivered and share.tokens.keys() != steps:
                yield f"round {one.number}: {device} delivered with {sorted(share.tokens)} only"
            if share.outcome not in ("delivered", "late", "lost"):
                yield f"round {one.number}: what became of {device} is {share.outcome}"


def _of_tokens(
    rounds: Sequence[AcceptedRound], lines: Sequence[dict[str, Any]], outcome: Path
) -> Iterator[str]:
    """Compare the books with what was reported by step and in all."""
    of_step: Counter[int] = Counter()
    of_device: Counter[str] = Counter()
    for one in rounds:
        for device, share in one.shares.items():
            of_step.update(share.tokens)
            of_device[device] += sum(share.tokens.values())
    reported = {e["step"] - 1: e["train/target_tokens"] for e in lines if "train/loss" in e}
    if reported != of_step:
        yield f"target tokens by step: {dict(of_step)} in the books, {reported} reported"
    devices = json.loads((outcome / "summary.json").read_text())["devices"]
    summed = {device: one["target_tokens"] for device, one in devices.items()}
    if +Counter(summed) != +of_device:
        yield f"target tokens by device: {dict(of_device)} in the books, {summed} summed up"


def _lines(outcome: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outcome / "metrics.jsonl").read_text().splitlines()]
