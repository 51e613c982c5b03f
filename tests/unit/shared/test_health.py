import logging
import subprocess
import sys

import pytest

from shared.errors import StorageError, UnhealthyError
from shared.health import HealthFile, check
from tests.support.fake_clock import FakeClock


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "health.json"


def test_a_program_that_makes_progress_is_healthy(path, clock):
    health = HealthFile(path, clock)
    clock.advance(50)
    health.progress("training")
    clock.advance(9)
    found = check(path, max_age_s=10, clock=clock)
    assert (found.phase, found.progress_monotonic_s) == ("training", 1050)


def test_starting_counts_as_progress(path, clock):
    HealthFile(path, clock)
    assert check(path, max_age_s=1, clock=clock).phase == "starting"


def test_a_program_without_progress_is_stuck(path, clock):
    HealthFile(path, clock).progress("training")
    clock.advance(11)
    with pytest.raises(UnhealthyError, match="no progress for 11 s in phase training"):
        check(path, max_age_s=10, clock=clock)


def test_progress_in_the_same_phase_is_written_at_most_once_a_second(path, clock):
    health = HealthFile(path, clock)
    health.progress("training")
    clock.advance(0.5)
    health.progress("training")
    assert check(path, max_age_s=1, clock=clock).progress_monotonic_s == 1000
    clock.advance(0.5)
    health.progress("training")
    assert check(path, max_age_s=1, clock=clock).progress_monotonic_s == 1001


def test_a_program_that_died_is_not_healthy_however_fresh_its_file(path, clock):
    child = "\n".join(
        [
            "import sys, pathlib",
            "from shared.health import HealthFile",
            "from shared.clock import SystemClock",
            "HealthFile(pathlib.Path(sys.argv[1]), SystemClock())",
        ]
    )
    subprocess.run([sys.executable, "-c", child, str(path)], check=True)
    with pytest.raises(UnhealthyError, match="stopped in phase starting"):
        check(path, max_age_s=1e9, clock=FakeClock(1e9))


def test_a_file_from_before_the_machine_was_started_again_is_not_healthy(path, clock):
    HealthFile(path, clock)
    with pytest.raises(UnhealthyError, match="stopped"):
        check(path, max_age_s=10, clock=FakeClock(5))


def test_a_program_that_ended_well_leaves_no_file(path, clock):
    health = HealthFile(path, clock)
    health.close()
    health.close()
    with pytest.raises(UnhealthyError, match="nothing runs there"):
        check(path, max_age_s=10, clock=clock)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_damaged_file_is_unhealthy_not_a_crash(path, clock, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UnhealthyError, match="no health file"):
        check(path, max_age_s=10, clock=clock)


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path, clock):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        HealthFile(tmp_path / "file" / "health.json", clock)


def test_a_folder_that_vanishes_later_is_logged_once_and_stops_nothing(path, clock, caplog):
    health = HealthFile(path, clock)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.advance(2)
            health.progress("training")
    assert [record.name for record in caplog.records] == ["shared.health"]
