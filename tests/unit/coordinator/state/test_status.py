"""`hsplit-coordinator status`: a run at work, one that ended, one that was killed."""

from __future__ import annotations

import json

import pytest

from coordinator.state import database, status
from coordinator.state.run_state import RunState
from shared.clock import SystemClock
from shared.errors import StorageError
from shared.health import FILE_NAME, HealthFile
from shared.protocol.messages import DeviceId
from tests.support.fake_clock import FakeClock
from tests.support.recorded_runs import DEVICES, RecordedRun, member, opened, trained
from tests.testbed.in_process import coordinator_main


def half_a_run(folder):
    """Leave a run in its second round, as if it were killed there; return its tokens by device."""
    state = RunState(folder, FakeClock(), resumed_round=None)
    for device in DEVICES:
        state.joined(member(device))
    opened(state, 1)
    for step in (0, 1):
        trained(state, step, {"nano": (100, 100), "orin": (1000,)})
    for device in DEVICES:
        state.delivered(DeviceId(device))
    state.round_closing([DeviceId(d) for d in DEVICES], {"nano": 400, "orin": 2000}, error=2e-7)
    state.round_closed(1)
    opened(state, 2)
    trained(state, 2, {"nano": (7,)})
    state.left_out(DeviceId("orin"), "left out after 40 s")
    return state


def test_a_run_that_goes_on_is_shown_while_it_does(tmp_path):
    state = half_a_run(tmp_path)
    HealthFile(tmp_path / FILE_NAME, SystemClock()).progress("round 2, step 3")
    ended = coordinator_main("status", str(tmp_path))
    assert ended.code == 0
    lines = [line.split() for line in ended.output.splitlines()]
    assert ended.output.startswith(f"{tmp_path}: coordinator at work: round 2, step 3\n")
    at = ["1970-01-01", "00:16:40"]
    assert ["1", "1", "closed", "0-1", *at, "2e-07", "2", "delivered"] in lines
    assert ["2", "1", "open", "2-3", *at, "1", "in", "round,", "1", "late"] in lines
    assert ["nano", "1", *at, *at, "1", "4", "4", "1", "400", "active"] in lines
    assert ["orin", "1", *at, *at, "1", "4", "4", "1", "2,000", "active"] in lines
    state.close("stopped")


def test_for_programs_there_is_all_of_it_as_json(tmp_path):
    half_a_run(tmp_path).close("too few devices")
    ended = coordinator_main("status", str(tmp_path), "--json")
    found = json.loads(ended.output)
    assert (found["coordinator"], found["phase"]) == ("not at work (too few devices)", None)
    first, second = found["rounds"]
    assert (first["state"], second["state"]) == ("closed", "open")
    nano, orin = second["participants"]
    assert (nano["device"], nano["steps"], orin["steps"]) == ("nano", 1, 0)
    assert (orin["outcome"], orin["reason"]) == ("late", "left out after 40 s")
    assert nano["ranks"] == {"h.0.fc": 4}
    assert [p["target_tokens"] for p in first["participants"]] == [400, 2000]
    assert found["devices"][0]["profile"]["machine"] == "board"


def test_a_killed_run_is_told_from_one_at_work(tmp_path):
    state = half_a_run(tmp_path)
    state._db.close()  # and nothing is said
    found = status.read(tmp_path, SystemClock())
    assert found["coordinator"] == "killed or stuck"
    assert "coordinator killed or stuck" in status.as_table(found)


def test_what_is_void_counts_for_nothing_and_says_why(tmp_path):
    half_a_run(tmp_path).close("stopped")
    with RunState(tmp_path, FakeClock(), resumed_round=0) as again:
        for device in DEVICES:
            again.joined(member(device, session="bbbbbbbb-1"))
        opened(again, 1)
    table = status.as_table(status.read(tmp_path, SystemClock()))
    assert "(started again 1 times)" in table
    assert "2 void (it began again)" in table
    (nano,) = [line.split() for line in table.splitlines() if line.startswith("nano")]
    assert nano[-3:] == ["0", "0", "done"]


def test_asking_changes_nothing(tmp_path):
    RecordedRun(tmp_path).live()
    before = (tmp_path / database.STATE_FILE).read_bytes()
    assert coordinator_main("status", str(tmp_path)).code == 0
    assert (tmp_path / database.STATE_FILE).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "state.sqlite"]


def test_a_folder_without_a_record_is_an_error_that_names_it(tmp_path):
    ended = coordinator_main("status", str(tmp_path))
    assert ended.code == StorageError.exit_code
    assert "state.sqlite" in ended.words
    with pytest.raises(StorageError, match="no run's"):
        status.read(tmp_path, SystemClock())
