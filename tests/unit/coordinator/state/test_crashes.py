"""Killed (SIGKILL) at whatever moment, a coordinator's record says what its checkpoint holds.

Each contribution has a number of target tokens of its own, and the checkpoint lists those that
went into it: the two must agree exactly. `tests.support.recorded_runs` makes the crashes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.state import database
from coordinator.state.run_state import RunState
from tests.support.fake_clock import FakeClock
from tests.support.recorded_runs import (
    DEVICES,
    ROUNDS,
    STEPS,
    RecordedRun,
    last_checkpoint,
    learnt_of,
)

ROOT = Path(__file__).resolve().parents[4]


TWICE_EVERY = 10
"""After these points the run is killed a second time; 1 is right as well, and takes minutes."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> list[Path]:
    """The folders of runs that were killed, each at other points."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.support.recorded_runs", str(folder), str(TWICE_EVERY)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=110)
    runs = sorted(folder.iterdir())
    assert len(runs) > 30, "a run has more points than that"
    return runs


@pytest.fixture
def resumable(killed, tmp_path) -> list[Path]:
    """Copies, to go on with."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in killed]


def rows(folder, query):
    with database.reading(folder / database.STATE_FILE) as db:
        return [tuple(row) for row in db.execute(query)]


def counted(folder):
    return sorted(rows(folder, "SELECT round, step, device, target_tokens FROM counted"))


def is_begun(folder):
    """Tell whether the run lived until its database had its tables."""
    path = folder / database.STATE_FILE
    return path.exists() and path.stat().st_size > 0


def test_a_killed_run_says_no_more_than_its_checkpoint_holds(killed):
    begun = [folder for folder in killed if is_begun(folder)]
    assert len(begun) < len(killed), "one was killed while it made its database"
    seen = set()
    for folder in begun:
        found = last_checkpoint(folder)
        closed = rows(folder, "SELECT round FROM rounds WHERE state = 'closed'")
        known = learnt_of(found)
        assert set(counted(folder)) <= set(known)
        saved = 0 if found is None else found.round
        closing = rows(folder, "SELECT round FROM rounds WHERE state = 'closing'")
        assert {number for (number,) in closed} <= set(range(saved + 1))
        # What the checkpoint holds is there in any case, confirmed or not.
        assert {number for (number,) in closed + closing} >= set(range(1, saved + 1))
        seen.add((saved, len(closed), len(closing)))
    # Among the points are: a round open, one aggregated and not saved, one saved and not confirmed.
    assert {(1, 1, 0), (1, 1, 1), (2, 1, 1), (1, 0, 1), (0, 0, 1)} <= seen


def test_the_next_start_brings_it_in_line_with_the_checkpoint(resumable):
    for folder in resumable:
        found = last_checkpoint(folder)
        resumed = None if found is None else found.round
        with RunState(folder, FakeClock(), resumed_round=resumed):
            pass
        assert counted(folder) == sorted(learnt_of(found))


def test_a_run_that_goes_on_records_each_contribution_once_and_deletes_nothing(resumable):
    for folder in resumable:
        RecordedRun(folder).live()
        expected = learnt_of(last_checkpoint(folder))
        assert counted(folder) == sorted(expected)
        assert [row[:3] for row in counted(folder)] == [
            (1 + step // STEPS, step, device)
            for step in range(ROUNDS * STEPS)
            for device in DEVICES
        ]
        live = "SELECT round, count(*) FROM rounds WHERE state <> 'void' GROUP BY round"
        assert rows(folder, live) == [(1, 1), (2, 1)]
        attempts = rows(folder, "SELECT round, attempt, state FROM rounds ORDER BY round, attempt")
        for number in (1, 2):
            own = [(attempt, state) for round_, attempt, state in attempts if round_ == number]
            assert [attempt for attempt, _ in own] == list(range(1, len(own) + 1))
            assert [state for _, state in own] == ["void"] * (len(own) - 1) + ["closed"]
        void = "SELECT DISTINCT outcome FROM participants JOIN rounds USING (round, attempt) WHERE "
        outcomes = {row[0] for row in rows(folder, void + "state = 'void'")}
        assert outcomes <= {"void"}
