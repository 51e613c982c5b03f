"""The real programs as processes over mosquitto: one calm run, and the same run disturbed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from importlib import metadata

import pytest
import yaml
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coordinator.model_store import ModelStore
from tests.support.brokers import Mosquitto
from tests.testbed import small_run
from tests.testbed.in_process import coordinator_main
from tests.testbed.mosquitto_runs import (
    SECRET,
    Calm,
    Disturbed,
    calm_run,
    disturbed_run,
    health,
)
from tests.testbed.system import System

# PEFT 0.21 asks transformers 5.23 by a name that is going away; neither is ours to change.
pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.timeout(300),  # the first test of a run waits for all of it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

TOTAL_STEPS = small_run.ROUNDS * small_run.STEPS


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with Mosquitto(tmp_path_factory.mktemp("mosquitto")) as broker:
        yield broker.url


@pytest.fixture(scope="module")
def calm(url, tmp_path_factory) -> Iterator[Calm]:
    with calm_run(url, tmp_path_factory.mktemp("calm")) as run:
        yield run


@pytest.fixture(scope="module")
def disturbed(url, tmp_path_factory) -> Iterator[Disturbed]:
    with disturbed_run(url, tmp_path_factory.mktemp("disturbed")) as run:
        yield run


# --- the calm run ---------------------------------------------------------------------------------


def test_every_program_ends_well(calm):
    assert calm.codes == {"coordinator": 0, "workstation": 0, "nano": 0}


def test_health_tells_a_running_program_from_one_that_ended(calm):
    assert calm.health == {"coordinator": 0, "nano": 0}
    assert health(calm.system) == {"coordinator": 20, "nano": 20}


def test_the_summary_is_complete_and_agrees_with_the_plan(calm):
    summary = calm.system.summary()
    assert summary.keys() == {
        *("perplexity_before", "perplexity_after", "steps", "seconds", "bytes_up", "bytes_down"),
        "devices",
    }
    assert summary["steps"] == TOTAL_STEPS
    assert min(summary["seconds"], summary["bytes_up"], summary["bytes_down"]) > 0
    devices = summary["devices"]
    assert {name: one["split_layer"] for name, one in devices.items()} == small_run.SPLIT_LAYERS
    assert {name: set(one["ranks"].values()) for name, one in devices.items()} == {
        name: {rank} for name, rank in small_run.RANKS.items()
    }
    # c_attn, two c_proj and c_fc in each block of the front
    assert {name: len(one["ranks"]) for name, one in devices.items()} == {
        name: 4 * blocks for name, blocks in small_run.SPLIT_LAYERS.items()
    }
    assert all(one["target_tokens"] > 0 for one in devices.values())


def test_perplexity_falls(calm):
    summary = calm.system.summary()
    assert summary["perplexity_after"] < 0.6 * summary["perplexity_before"]


def test_metrics_hold_every_step_and_every_round_once(calm):
    assert_complete_metrics(calm.system)


def assert_complete_metrics(system: System) -> None:
    lines = system.metrics()
    trained = [line["step"] for line in lines if "train/loss" in line]
    assert trained == list(range(1, TOTAL_STEPS + 1))
    assert [line["round"] for line in lines if "round/seconds" in line] == [1, 2, 3]
    evaluated = {line["step"] for line in lines if "eval/loss" in line}
    assert evaluated == set(range(0, TOTAL_STEPS + 1, small_run.STEPS))


def test_the_record_has_every_step_once_and_every_token(calm):
    assert_complete_record(calm.system)
    assert status(calm.system)["coordinator"] == "not at work (complete)"


def test_what_computes_on_each_device_is_in_the_record(calm):
    devices = {one["device"]: one["profile"] for one in status(calm.system)["devices"]}
    assert devices.keys() == small_run.SPLIT_LAYERS.keys()
    for profile in devices.values():
        assert profile["computes_with"].startswith(f"torch {metadata.version('torch')}")


def status(system: System) -> dict:
    ended = coordinator_main("status", str(system.run_folder), "--json")
    assert ended.code == 0, ended.words
    return json.loads(ended.output)


def assert_complete_record(system: System) -> None:
    live = [one for one in status(system)["rounds"] if one["state"] != "void"]
    assert [(one["round"], one["state"]) for one in live] == [(n, "closed") for n in (1, 2, 3, 4)]
    for one in live[:3]:
        parts = {part["device"]: part for part in one["participants"]}
        assert {device: part["steps"] for device, part in parts.items()} == dict.fromkeys(
            small_run.SPLIT_LAYERS, small_run.STEPS
        )
    for device, own in system.summary()["devices"].items():
        mine = [p for one in live for p in one["participants"] if p["device"] == device]
        assert [p["outcome"] for p in mine] == ["delivered"] * 3 + ["evaluated"]
        assert sum(p["target_tokens"] or 0 for p in mine) == own["target_tokens"]


def test_tensorboard_shows_the_same_curve(calm):
    events = EventAccumulator(str(calm.folder / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    written = {m["step"]: m["train/loss"] for m in calm.system.metrics() if "train/loss" in m}
    assert shown == pytest.approx(written, rel=1e-6)


def test_the_latest_checkpoints_are_kept(calm):
    kept = sorted(path.name for path in (calm.folder / "checkpoints").iterdir())
    assert kept == ["round-000001", "round-000002", "round-000003"]


def test_run_yaml_has_every_setting_and_no_file_a_secret(calm):
    resolved = yaml.safe_load((calm.folder / "run.yaml").read_text())
    assert resolved["broker"]["username"] == "operator"
    assert resolved["optimizer"]["warmup_steps"] == 2
    assert resolved["training"]["labels"] == "device"  # a default, written all the same
    written = [path for path in calm.system.folder.rglob("*") if path.is_file()]
    assert calm.folder / "run.yaml" in written
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def test_the_adapter_on_the_plain_model_has_the_loss_that_the_run_reported(calm):
    opened = PeftModel.from_pretrained(small_run.plain_model(), str(calm.folder / "adapter"))
    reported = calm.evaluations()
    ours = small_run.held_out_loss(opened.eval(), calm.held_out)
    assert ours == pytest.approx(reported[-1], abs=1e-4)
    plain = small_run.held_out_loss(small_run.plain_model(), calm.held_out)
    assert plain == pytest.approx(reported[0], abs=1e-4)


def test_evaluate_finds_the_perplexity_that_the_run_reported(calm):
    files = [str(file) for file in calm.held_out]
    flags = ("--metrics", "perplexity", "--device", "cpu", "--threads", "1", "--json")
    ended = coordinator_main("evaluate", str(calm.folder), "--data", *files, *flags)
    assert ended.code == 0, ended.words
    found = json.loads(ended.output)["metrics"]["perplexity"]
    assert math.log(found) == pytest.approx(calm.evaluations()[-1], abs=1e-4)


def test_export_writes_the_adapter_and_the_merged_model(calm, tmp_path):
    again, whole = tmp_path / "again", tmp_path / "whole"
    ended = coordinator_main("export", str(calm.folder), "--to", str(again))
    assert (ended.code, ended.output.strip()) == (0, str(again))
    assert small_run.distance(again, calm.folder / "adapter") < 1e-6
    assert coordinator_main("export", str(calm.folder), "--merged", "--to", str(whole)).code == 0
    # The base is stored in float16, and so is the merged model.
    merged = small_run.held_out_loss(small_run.plain_model(whole), calm.held_out)
    assert merged == pytest.approx(calm.evaluations()[-1], abs=5e-3)


def test_the_same_run_id_is_not_started_twice(calm):
    before = (calm.folder / "metrics.jsonl").read_bytes()
    ended = coordinator_main("run", str(calm.system.run_file))
    assert ended.code == 2
    assert str(calm.folder) in ended.words
    assert "--resume" in ended.words
    assert (calm.folder / "metrics.jsonl").read_bytes() == before


def test_a_device_holds_only_the_pieces_of_its_front(calm, tmp_path):
    described = ModelStore.open(str(small_run.BASE), cache_folder=tmp_path).describe()
    sha256 = {piece.name: piece.sha256 for piece in described.pieces}
    for device, split_layer in small_run.SPLIT_LAYERS.items():
        blocks = [f"block.{number}" for number in range(split_layer)]
        held = {sha256[name] for name in ("tokenizer", "embeddings", "final_norm", *blocks)}
        cache = calm.system.folder / device / "cache"
        assert {path.name for path in cache.iterdir()} == held


# --- the same run, disturbed ----------------------------------------------------------------------


def test_stopped_by_sigterm_a_run_is_down_but_not_lost(disturbed):
    assert disturbed.stopped == 143
    health_code, export_code = disturbed.between
    assert health_code == 20
    assert export_code == 0


def test_resumed_it_goes_on_with_agents_that_waited(disturbed):
    assert disturbed.codes == {"coordinator2": 0, "workstation": 0, "nano": 0}
    assert "resuming" in (disturbed.system.folder / "coordinator2.log").read_text()
    assert_complete_metrics(disturbed.system)
    assert disturbed.system.summary()["steps"] == TOTAL_STEPS


def test_the_record_of_both_starts_counts_nothing_twice(disturbed):
    assert_complete_record(disturbed.system)
    found = status(disturbed.system)
    endings = [(one["resumed_round"], one["ending"]) for one in found["starts"]]
    assert endings == [(None, "stopped (TerminatedError)"), (1, "complete")]
    attempts = [(one["round"], one["attempt"], one["state"]) for one in found["rounds"]]
    assert (2, 1, "void") in attempts
    assert (2, 2, "closed") in attempts


def test_garbage_on_every_topic_changes_nothing(disturbed, calm):
    """Nor does the stop: all in all the same adapters as those of the calm run."""
    assert disturbed.garbage > 200
    assert disturbed.evaluations()[-1] == pytest.approx(calm.evaluations()[-1], abs=1e-4)
    assert small_run.distance(disturbed.folder / "adapter", calm.folder / "adapter") < 1e-4


def test_a_second_agent_with_the_same_id_is_refused_and_the_first_goes_on(disturbed):
    ended = disturbed.guests["same id"]
    assert ended.code == 16
    assert "another agent is connected as 'workstation'" in ended.words


def test_a_device_where_not_even_one_block_fits_is_told_both_numbers(disturbed):
    ended = disturbed.guests["no memory"]
    assert ended.code == 5
    assert re.search(r"at up to \d{2,4} MiB of 1 MiB that it may use", ended.words)
    assert "Give it more memory, or lower plan.micro_batch" in ended.words


def test_conversations_need_a_model_with_a_chat_template(disturbed):
    ended = disturbed.guests["no template"]
    assert ended.code == 4
    assert "chats.jsonl holds 'messages', but the model tiny-gpt2 has no chat" in ended.words


def test_another_protocol_version_is_answered_with_what_to_do(disturbed):
    assert disturbed.answer is not None
    assert disturbed.answer.code == "version"
    assert "protocol version 9, this side speaks 1: upgrade" in disturbed.answer.reason


def test_refused_guests_are_no_part_of_the_run(disturbed):
    assert disturbed.system.summary()["devices"].keys() == {"nano", "workstation"}
