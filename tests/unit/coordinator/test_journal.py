import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from coordinator import json_lines
from coordinator.journal import Journal
from shared.errors import StorageError
from tests.support.fake_clock import FakeClock

NANO = {
    "split_layer": 3,
    "batch": 8,
    "micro_batch": 4,
    "in_flight": 2,
    "ranks": {"transformer.h.0.attn.c_attn": 16},
    "reason": "k = 3: memory allows 5, but the link makes 3 faster",
    "predicted_step_s": 0.8,
}


def write(folder, steps, *, resumed_step=None):
    with contextlib.closing(Journal(folder, FakeClock(), resumed_step)) as journal:
        for step in steps:
            journal.plan(step, step, predicted_step_s=None, devices={}, refused={})
            journal.importance(step, step, {"transformer.h.0.attn.c_attn": float(step)})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(folder):
    return json.loads((folder / "importance.json").read_text())


def test_a_plan_is_one_line_with_each_devices_part_and_reason(tmp_path):
    journal = Journal(tmp_path, FakeClock())
    journal.plan(
        1, 0, predicted_step_s=1.5, devices={"nano": NANO}, refused={"pi": "needs 2 GiB, has 1"}
    )
    assert lines(tmp_path / "plans.jsonl") == [  # read before the file is closed
        {
            "time": 1000.0,
            "round": 1,
            "step": 0,
            "predicted_step_s": 1.5,
            "devices": {"nano": NANO},
            "refused": {"pi": "needs 2 GiB, has 1"},
            "server_ranks": {},
        }
    ]
    journal.close()


def test_importance_is_a_line_and_the_latest_stands_in_a_file_of_its_own(tmp_path):
    with contextlib.closing(Journal(tmp_path, FakeClock())) as journal:
        journal.importance(1, 0, {"transformer.h.0.attn.c_attn": 0.5})
        journal.importance(3, 40, {"transformer.h.0.attn.c_attn": 0.75})
        written = lines(tmp_path / "importance.jsonl")
    assert [line["scores"] for line in written] == [
        {"transformer.h.0.attn.c_attn": 0.5},
        {"transformer.h.0.attn.c_attn": 0.75},
    ]
    assert latest(tmp_path) == written[-1]


def test_numbers_are_json_whatever_they_come_as(tmp_path):
    nano = NANO | {
        "predicted_step_s": float("inf"),
        "batch": np.int64(6),
        "ranks": {"q": np.int32(4)},
    }
    with contextlib.closing(Journal(tmp_path, FakeClock())) as journal:
        journal.plan(1, 0, predicted_step_s=np.nan, devices={"nano": nano}, refused={})
        journal.importance(1, 0, {"q": np.float32("nan"), "v": np.float32(0.5)})
    (plan,) = lines(tmp_path / "plans.jsonl")
    assert plan["predicted_step_s"] is None
    assert plan["devices"]["nano"] == NANO | {
        "predicted_step_s": None,
        "batch": 6,
        "ranks": {"q": 4},
    }
    assert latest(tmp_path)["scores"] == {"q": None, "v": 0.5}


def test_a_resumed_run_drops_what_it_will_decide_again(tmp_path):
    write(tmp_path, [0, 20, 40, 60])
    write(tmp_path, [40], resumed_step=20)
    for name in ("plans.jsonl", "importance.jsonl"):
        assert [line["step"] for line in lines(tmp_path / name)] == [0, 20, 40]


@pytest.mark.parametrize(("resumed_step", "step"), [(60, 60), (59, 40), (0, 0)])
def test_the_latest_importance_goes_back_with_a_resumed_run(tmp_path, resumed_step, step):
    write(tmp_path, [0, 20, 40, 60])
    write(tmp_path, [], resumed_step=resumed_step)
    assert latest(tmp_path)["step"] == step


@pytest.mark.parametrize("resumed_step", [None, 10])
def test_no_importance_of_steps_that_are_to_come_stays_behind(tmp_path, resumed_step):
    write(tmp_path, [20])
    write(tmp_path, [], resumed_step=resumed_step)
    assert not (tmp_path / "importance.json").exists()
    assert (tmp_path / "plans.jsonl").read_text() == ""


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    write(tmp_path, [0])
    for name in ("plans.jsonl", "importance.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"time": 1, "round": 1, "step": 0, "scores"')
    write(tmp_path, [20], resumed_step=20)
    for name in ("plans.jsonl", "importance.jsonl"):
        assert [line["step"] for line in lines(tmp_path / name)] == [0, 20]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match=r"plans\.jsonl cannot be written"):
        Journal(tmp_path / "run", FakeClock())


def test_a_full_disk_is_told(tmp_path):
    journal = Journal(tmp_path, FakeClock())
    journal.close()
    journal._plans = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(StorageError, match="No space left"):
        journal.plan(1, 0, predicted_step_s=None, devices={}, refused={})
    journal.close()


class BytewiseFile(io.RawIOBase):
    """Takes one byte a write, as a disk may that is nearly full."""

    def __init__(self):
        self.taken = b""

    def writable(self):
        return True

    def write(self, data):
        self.taken += bytes(data[:1])
        return 1


def test_a_write_that_takes_only_a_part_is_gone_on_with():
    file = BytewiseFile()
    json_lines.append(file, {"step": 1})
    assert file.taken == b'{"step": 1}\n'


def test_what_is_no_object_is_left_out_when_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'[1]\n{"step": 1}\n\xff\n\n' + b"[" * 100_000 + b'\n{"step": 2}'
    )
    assert json_lines.records(tmp_path / "a.jsonl") == [{"step": 1}]
    assert json_lines.records(tmp_path / "none.jsonl") == []
