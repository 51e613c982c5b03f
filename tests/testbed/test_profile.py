"""``hsplit-agent profile`` with the shipped base: a real probe, a real broker, a real cache."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from shared import profile_file
from shared.architecture import ModelArchitecture
from shared.errors import ConfigError
from tests.support.brokers import Mosquitto, free_port
from tests.testbed import small_run
from tests.testbed.in_process import Ended, agent_main

FROM_CACHE = "compute and memory are from the cache"
SMALL = ("--threads", "1", "--micro-batch", "2", "--length", "16")
MODEL = ("--model", str(small_run.BASE))


@contextlib.contextmanager
def own_folders(folder: Path) -> Iterator[None]:
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
    with mock.patch.dict(os.environ, {**own, "HF_HUB_OFFLINE": "1"}):
        yield


@pytest.fixture(autouse=True)
def _own_folders(tmp_path) -> Iterator[None]:
    with own_folders(tmp_path):
        yield


def test_a_model_is_not_measured_with_a_backend_that_has_no_code_of_it():
    ended = agent_main("profile", *MODEL, *SMALL, "--device-id", "nano", "--backend", "onnx")
    assert ended.code == ConfigError.exit_code
    assert "measures itself with a run's graphs when it joins one" in ended.words


@dataclass(frozen=True)
class Runs:
    """The same command three times: as a table, from the cache as JSON, and afresh to a file."""

    table: Ended
    cached: Ended
    fresh: Ended
    file: Path
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("profile")
    file = folder / "nano.json"
    busy_or_not = mock.patch("edge_agent.profiler.BUSY_SPREAD", 1e9)
    with own_folders(folder), busy_or_not, Mosquitto(folder) as broker:
        flags = ("profile", *MODEL, *SMALL, "--device-id", "nano", "--broker", broker.url)
        yield Runs(
            agent_main(*flags),
            agent_main(*flags, "--json"),
            agent_main(*flags, "--fresh", "--output", str(file), "--labels", "server"),
            file,
            folder,
        )


@pytest.mark.broker
def test_the_table_has_compute_memory_and_link(runs):
    assert runs.table.code == 0, runs.table.words
    for part in ("nano", "tiny-gpt2, 6 blocks", "each block", "head", "step, 1 block"):
        assert part in runs.table.output
    assert "per block at micro-batch 2 x 16 tokens" in runs.table.output
    assert "round trip" in runs.table.output


@pytest.mark.broker
def test_the_second_time_compute_comes_from_the_cache(runs):
    assert FROM_CACHE not in runs.table.words
    assert FROM_CACHE in runs.cached.words
    assert len(list((runs.folder / "state/hsplit/nano/profiles").iterdir())) == 2


@pytest.mark.broker
def test_json_is_all_that_stdout_has(runs):
    value = json.loads(runs.cached.output)
    measured = value["measurements"]
    config = json.loads((small_run.BASE / "config.json").read_text())
    assert measured["model"] == ModelArchitecture.from_config(config).fingerprint
    assert {(p["blocks"], p["sequences"]) for p in measured["blocks"]} >= {(1, 1), (1, 2), (3, 1)}
    assert {p["length"] for p in measured["blocks"]} == {16}
    assert measured["runtime_bytes"] < measured["blocks"][0]["peak_bytes"]
    assert measured["memory_bytes"] > measured["runtime_bytes"]
    assert measured["link"]["uplink_bytes_per_s"] > 0
    assert value["facts"]["memory_bytes"] > 0


@pytest.mark.broker
def test_a_profile_is_written_for_the_planner(runs):
    assert runs.fresh.code == 0, runs.fresh.words
    assert FROM_CACHE not in runs.fresh.words
    profile = profile_file.read(runs.file)
    assert (profile.device_id, profile.measurements.threads) == ("nano", 1)
    assert profile.measurements.head == (), "with labels: server the head is elsewhere"
    assert profile.measurements.link is not None


@pytest.mark.broker
def test_nothing_of_the_model_stays_behind(runs):
    assert list((runs.folder / "cache" / "hsplit").iterdir()) == []


def test_without_a_model_there_are_facts_and_what_to_do_for_more():
    ended = agent_main("profile")
    assert ended.code == 0, ended.words
    assert "may be used" in ended.output
    assert "--model FOLDER_OR_HUB_NAME" in ended.output
    assert "--broker URL" in ended.output
    as_json = json.loads(agent_main("profile", "--json", "--device-id", "nano").output)
    assert as_json["device_id"] == "nano"
    assert as_json["memory_bytes"] > 0
    assert "measurements" not in as_json


def test_an_emulated_device_has_the_memory_that_it_plays():
    ended = agent_main("profile", "--json", "--emulate", "memory=64MiB")
    assert json.loads(ended.output)["memory_bytes"] == 64 * 2**20


# --- what people get wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--model", "./none"], 4, ["model ./none: no such folder; check --model"]),
        (["--model", "nobody/none"], 4, ["model nobody/none", "check --model"]),
        ([*MODEL, "--length", "513"], 5, ["--length", "513 tokens", "512 positions"]),
        ([*MODEL, "--length", "-1"], 2, ["length (--length)", "greater than or equal to 1"]),
        ([*MODEL, "--micro-batch", "0"], 2, ["micro_batch (--micro-batch)"]),
        ([*MODEL, "--labels", "both"], 2, ["labels (--labels)", "'device' or 'server'"]),
        (["--threads", "none"], 2, ["threads (--threads)"]),
        (["--memory-limit", "2"], 2, ["memory_limit (--memory-limit)", "2GiB"]),
        (["--emulate", "speed=2"], 2, ["emulate (--emulate)"]),
        (["--device-id", "a/b"], 2, ["device_id (--device-id)"]),
        (["--broker", "http://x"], 2, ["broker.url (--broker)", "mqtt://host"]),
        (["--config", "/none.yaml"], 2, ["/none.yaml", "cannot be read"]),
        (["--output", "x.json"], 2, ["--output", "add --model"]),
        (["--data", "x.jsonl"], 2, ["unrecognized arguments: --data"]),
        ([*MODEL, *SMALL, "--memory-limit", "1MiB"], 5, ["could not be measured", "more memory"]),
        ([*MODEL, *SMALL, "--device", "cuda:77"], 2, ["cuda:77"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_it_ends_with_a_code_and_a_word_about_it(flags, code, parts):
    ended = agent_main("profile", *flags)
    assert ended.code == code, ended.words
    missing = [part for part in parts if part not in ended.words]
    assert not missing, ended.words
    assert "Traceback" not in ended.words
    assert ended.output == ""


def test_a_broker_that_is_not_there_ends_it_before_anything_is_measured(monkeypatch):
    monkeypatch.setenv("HSPLIT_BROKER__CONNECT_TIMEOUT_S", "0.5")
    ended = agent_main("profile", *MODEL, *SMALL, "--broker", f"mqtt://127.0.0.1:{free_port()}")
    assert ended.code == 11
    assert "no broker answers" in ended.words
    assert "measuring this device" not in ended.words


def test_an_address_where_no_broker_speaks_is_not_waited_for_in_vain(monkeypatch):
    monkeypatch.setenv("HSPLIT_BROKER__CONNECT_TIMEOUT_S", "0.5")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        ended = agent_main("profile", "--broker", f"mqtt://127.0.0.1:{mute.getsockname()[1]}")
    assert ended.code == 11
    assert "connected, but got no answer" in ended.words


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    ended = agent_main("profile", *MODEL, *SMALL, "--cache-folder", str(tmp_path / "file" / "x"))
    assert ended.code == 18
    assert "cache_folder" in ended.words
