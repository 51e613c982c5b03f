"""`state.sqlite` as a file: what is refused at the start, a full disk, readers, permissions."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess

import pytest

from coordinator.state import database
from coordinator.state.database import STATE_FILE
from coordinator.state.run_state import RunState
from shared.clock import SystemClock
from shared.errors import StorageError
from shared.protocol.messages import DeviceId
from tests.support.recorded_runs import DEVICES, RecordedRun, member, opened, trained


def state_in(folder, *, resumed_round=None):
    return RunState(folder, SystemClock(), resumed_round=resumed_round)


def written(folder):
    """Make the record of a small run, and return its path."""
    RecordedRun(folder).live()
    return folder / STATE_FILE


def all_of(path, query):
    with database.reading(path) as db:
        return [tuple(row) for row in db.execute(query)]


def test_it_is_in_wal_mode_and_its_tables_are_strict(tmp_path):
    path = written(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    assert all_of(path, "SELECT DISTINCT strict FROM pragma_table_list WHERE type = 'table' "
                        "AND name NOT LIKE 'sqlite%'") == [(1,)]  # fmt: skip


@pytest.mark.parametrize("junk", [b"not a database at all " * 400, os.urandom(9000)])
def test_a_file_that_is_no_database_is_refused_with_what_to_do(junk, tmp_path):
    (tmp_path / STATE_FILE).write_bytes(junk)
    with pytest.raises(StorageError, match=r"state\.sqlite.*move it away.*--resume makes a new"):
        state_in(tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == junk


@pytest.mark.parametrize("how", ["cut", "overwritten"])
def test_a_torn_database_is_refused_with_what_to_do(how, tmp_path):
    path = written(tmp_path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(size // 2)
        else:
            file.seek(size // 2)
            file.write(b"\xa5" * (size // 3))
    with pytest.raises(StorageError, match=r"state\.sqlite.*move it away"):
        state_in(tmp_path, resumed_round=2)


def test_damage_where_nobody_looks_at_first_is_found_at_the_start(tmp_path):
    path = written(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        (root,) = db.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'contributions'"
        ).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(bytes(size))
    with pytest.raises(StorageError, match=r"state\.sqlite is damaged.*move it away"):
        state_in(tmp_path, resumed_round=2)


def test_the_database_of_another_program_is_left_alone(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / STATE_FILE)) as other:
        other.execute("CREATE TABLE notes (text)")
    before = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(StorageError, match="of another program"):
        state_in(tmp_path)
    with pytest.raises(StorageError, match="of another program"):
        all_of(tmp_path / STATE_FILE, "SELECT 1")
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_a_database_of_a_later_version_is_refused(tmp_path):
    path = written(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as later:
        later.execute("PRAGMA user_version = 2")
    with pytest.raises(StorageError, match="schema 2.* knows 1"):
        state_in(tmp_path)


def test_where_there_is_none_a_run_that_goes_on_makes_one_and_says_so(tmp_path, caplog):
    RecordedRun(tmp_path).live()
    for file in tmp_path.glob("state.sqlite*"):
        file.unlink()
    with caplog.at_level("INFO"), state_in(tmp_path, resumed_round=1) as state:
        state.joined(member("nano"))
        opened(state, 2, devices=["nano"])
    assert "made anew: it begins with round 2" in caplog.text
    assert all_of(tmp_path / STATE_FILE, "SELECT round, attempt FROM rounds") == [(2, 1)]


def test_a_folder_that_cannot_take_it_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"state\.sqlite cannot be written: No such file"):
        state_in(tmp_path / "none")
    with pytest.raises(StorageError, match="the folder is no run's"):
        all_of(tmp_path / STATE_FILE, "SELECT 1")


def test_its_files_have_the_mode_of_the_folders_other_files(tmp_path):
    before = os.umask(0o007)
    try:
        (tmp_path / "metrics.jsonl").write_bytes(b"")
        with state_in(tmp_path) as state:
            state.joined(member("nano"))
            files = [*tmp_path.iterdir()]
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in files}
    finally:
        os.umask(before)
    names = ("metrics.jsonl", "state.sqlite", "state.sqlite-wal", "state.sqlite-shm")
    assert modes == dict.fromkeys(names, 0o660)


def test_a_reader_neither_waits_nor_holds_up_the_writer(tmp_path):
    """Within one read, it sees one moment."""
    with state_in(tmp_path) as state:
        state.joined(member("nano"))
        with database.reading(tmp_path / STATE_FILE) as db:
            assert len(db.execute("SELECT * FROM sessions").fetchall()) == 1
            state.joined(member("orin"))
            assert len(db.execute("SELECT * FROM sessions").fetchall()) == 1
        with database.transaction(state._db, tmp_path / STATE_FILE):
            state._db.execute("DELETE FROM sessions")
            assert len(all_of(tmp_path / STATE_FILE, "SELECT * FROM sessions")) == 2


@pytest.mark.parametrize("at_work", [True, False])
def test_a_reader_cannot_write(at_work, tmp_path):
    path = written(tmp_path)
    with (
        state_in(tmp_path) if at_work else contextlib.nullcontext(),
        pytest.raises(StorageError, match="readonly database"),
        database.reading(path) as db,
    ):
        db.execute("DELETE FROM rounds")


# --- a full disk --------------------------------------------------------------------------------


def train_until_full(state):
    """Close steps until no more fit."""
    for device in DEVICES:
        state.joined(member(device))
    for number in range(1, 10_000):
        opened(state, number)
        if number > 2:
            state.round_closed(number)
            continue
        for step in range(2 * number - 2, 2 * number):
            trained(state, step, dict.fromkeys(DEVICES, (1, 2)))
        state.round_closing([DeviceId(d) for d in DEVICES], {}, error=0.0)
        state.round_closed(number)


def check_it_is_whole_and_goes_on(folder):
    """Open it again with room: no row of a transaction that failed is there."""
    with state_in(folder, resumed_round=2) as state:
        state.joined(member("nano", session="aaaaaaaa-2"))
    path = folder / STATE_FILE
    assert all_of(path, "PRAGMA integrity_check") == [("ok",)]
    attempts = all_of(path, "SELECT count(*) FROM rounds")[0][0]
    assert all_of(path, "SELECT count(*) FROM participants") == [(attempts * len(DEVICES),)]


def test_a_database_that_may_not_grow_is_our_error_and_stays_whole(tmp_path):
    state = state_in(tmp_path)
    state._db.execute("PRAGMA max_page_count = 40")
    with pytest.raises(StorageError, match=r"state\.sqlite.*full; free some space.*--resume"):
        train_until_full(state)
    assert not state._db.in_transaction
    state.close("no space")
    check_it_is_whole_and_goes_on(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, for real."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small disk wants the right to mount one")
    options = [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_our_error_and_the_record_goes_on_when_there_is_room(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(60_000))
    state = state_in(small_disk)
    with pytest.raises(StorageError, match=r"state\.sqlite.*(full|I/O).*--resume"):
        train_until_full(state)
    state.close("no space")
    ballast.unlink()
    check_it_is_whole_and_goes_on(small_disk)


def test_a_disk_that_is_full_at_the_start_is_our_error(small_disk):
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(300_000))
    with pytest.raises(StorageError, match=r"state\.sqlite"):
        state_in(small_disk)
