import contextlib
import json
import signal
from pathlib import Path

import pytest

from coordinator.metrics import DeviceSummary, MetricsWriter, Summary
from shared.errors import StorageError
from shared.program import INTERRUPTED, exit_code
from tests.support.fake_clock import FakeClock
from tests.support.metrics import read_metrics


def write_steps(folder, steps, *, resumed_step=None, tensorboard=False):
    with contextlib.closing(
        MetricsWriter(folder, FakeClock(), tensorboard=tensorboard, resumed_step=resumed_step)
    ) as writer:
        for step in steps:
            writer.write({"train/loss": 10.0 - step}, round_=1, step=step)


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_each_write_is_one_json_line_with_time_round_and_step(tmp_path):
    writer = MetricsWriter(tmp_path, FakeClock(), tensorboard=False)
    writer.write({"train/loss": 2.5, "device/nano/step_s": 0.5}, round_=1, step=3)
    line = (tmp_path / "metrics.jsonl").read_text()  # read before the file is closed
    writer.close()
    assert json.loads(line) == {
        "time": 1000.0,
        "round": 1,
        "step": 3,
        "train/loss": 2.5,
        "device/nano/step_s": 0.5,
    }


def test_the_file_stays_json_where_a_value_is_not_finite(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, FakeClock(), tensorboard=False)) as writer:
        writer.write({"train/loss": float("nan")}, round_=1, step=1)
    assert read_metrics(tmp_path)[0]["train/loss"] is None


def test_a_resumed_run_drops_what_it_will_measure_again(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4])
    write_steps(tmp_path, [3], resumed_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_what_a_repeated_round_measures_again_stands_there_once(tmp_path, tensorboard):
    with contextlib.closing(
        MetricsWriter(tmp_path, FakeClock(), tensorboard=tensorboard)
    ) as writer:
        for step in (1, 2, 3):
            writer.write({"train/loss": 10.0 - step}, round_=1, step=step)
        writer.rewind(1)
        writer.write({"train/loss": 5.0}, round_=1, step=2)
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [9.0, 5.0]
    if tensorboard:
        assert scalars(tmp_path, "train/loss") == [(1, 9.0), (2, 5.0)]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    write_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "round": 1, "step": 2')
    write_steps(tmp_path, [2], resumed_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_new_run_begins_an_empty_file(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])
    assert len(read_metrics(tmp_path)) == 1


def test_tensorboard_shows_the_same_values_and_forgets_what_was_resumed(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4], tensorboard=True)
    assert scalars(tmp_path, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    write_steps(tmp_path, [3], tensorboard=True, resumed_step=2)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3]


def test_without_tensorboard_no_events_are_written(tmp_path):
    write_steps(tmp_path, [1])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written"):
        MetricsWriter(tmp_path / "run", FakeClock(), tensorboard=False)


def test_a_full_disk_is_told(tmp_path):
    writer = MetricsWriter(tmp_path, FakeClock(), tensorboard=False)
    writer._file.close()
    writer._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(StorageError, match="No space left"):
        writer.write({"train/loss": 1.0}, round_=1, step=1)
    writer.close()


def test_the_summary_says_what_the_run_did(tmp_path):
    summary = Summary(
        perplexity_before=220.0,
        perplexity_after=None,
        steps=120,
        seconds=60.5,
        bytes_up=10,
        bytes_down=20,
        devices={
            "nano": DeviceSummary(
                split_layer=1, ranks={"transformer.h.0.attn.c_attn": 4}, target_tokens=900
            )
        },
    )
    assert json.loads(summary.save(tmp_path).read_text()) == {
        "perplexity_before": 220.0,
        "perplexity_after": None,
        "steps": 120,
        "seconds": 60.5,
        "bytes_up": 10,
        "bytes_down": 20,
        "devices": {
            "nano": {
                "split_layer": 1,
                "ranks": {"transformer.h.0.attn.c_attn": 4},
                "target_tokens": 900,
            }
        },
    }


def test_ctrl_c_waits_until_tensorboard_has_taken_what_it_is_given(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, FakeClock(), tensorboard=True)
    taken = []

    def interrupted(name: str, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        taken.append(name)

    monkeypatch.setattr(writer._events, "add_scalar", interrupted)

    def work() -> int:
        writer.write({"a": 1.0, "b": 2.0}, round_=1, step=1)
        return 0

    assert exit_code(work) == INTERRUPTED
    assert taken == ["a", "b"]
    writer.close()
