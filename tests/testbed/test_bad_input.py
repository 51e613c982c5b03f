"""What people get wrong: the exit code, and a message that says what, where and what to do.

Nothing here needs a run, so the programs' ``main`` is called in this process. What happens to
guests of a run that goes on is in test_whole_system.py.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator import run_folder
from shared.protocol.messages import DeviceId
from shared.protocol.topics import device_topic
from tests.support.brokers import Mosquitto, free_port, write_passwords
from tests.testbed import noise, small_run
from tests.testbed.in_process import Ended, agent_main, coordinator_main

Started = Callable[..., Ended]

GOOD_LINE = '{"prompt": "a ->", "completion": " b"}'


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home-state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def coordinator(tmp_path) -> Started:
    """Start a coordinator whose settings are good but for ``changes`` of whole sections."""

    def start(*flags: str, **changes: Any) -> Ended:
        whole = {
            **small_run.settings(),
            "run": {"id": "test", "folder": str(tmp_path / "runs")},
            "broker": {"url": nobody(), "connect_timeout_s": 0.5},
            **changes,
        }
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}))
        return coordinator_main("run", str(file), *flags)

    return start


@pytest.fixture
def agent(tmp_path, monkeypatch) -> Started:
    """Start an agent with good text, but for the flags given."""
    data = tmp_path / "good.jsonl"
    data.write_text((GOOD_LINE + "\n") * 4)
    monkeypatch.setenv("HSPLIT_BROKER__CONNECT_TIMEOUT_S", "0.5")

    def start(*flags: str) -> Ended:
        wanted = ["--broker", nobody(), "--device-id", "nano", "--data", str(data), *flags]
        return agent_main("run", *wanted)

    return start


def nobody() -> str:
    return f"mqtt://127.0.0.1:{free_port()}"


def assert_said(ended: Ended, code: int, *parts: str) -> None:
    assert ended.code == code, ended.words
    missing = [part for part in parts if part not in ended.words]
    assert not missing, ended.words
    assert "Traceback" not in ended.words


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([GOOD_LINE, '{"prompt": "a'], [":2: not JSON", "write one JSON object per line"]),
        ([GOOD_LINE, GOOD_LINE, '{"prompt": "a"}'], [":3: column 'completion' is missing"]),
        (['{"words": "a"}'], [":1: has none of the columns", "rename the column"]),
        ([GOOD_LINE, '{"text": "a"}'], [":2: this line is of the format 'text'", "two files"]),
        ([], ["no records; put one JSON object per line"]),
        (["", "  "], ["no records; put one JSON object per line"]),
    ],
    ids=["malformed", "missing-column", "no-column", "two-formats", "empty", "blank"],
)
def test_unusable_text_stops_an_agent_before_it_connects(agent, tmp_path, lines, parts):
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join(lines))
    # The address answers nobody: exit code 3, not 11, shows that the text came first.
    assert_said(agent("--data", str(data)), 3, str(data), *parts)


def test_a_missing_file_is_named(agent, tmp_path):
    missing = tmp_path / "nowhere.jsonl"
    assert_said(agent("--data", str(missing)), 3, f"{missing}: no such file; check the path")
    assert_said(agent("--evaluation-data", str(missing)), 3, str(missing))


# --- the model ------------------------------------------------------------------------------------


def copied_base(folder: Path, *, without: str = "", **config: Any) -> Path:
    """Return a folder like the shipped base, less one file and with another config."""
    folder.mkdir()
    for path in small_run.BASE.iterdir():
        if path.name != without:
            (folder / path.name).symlink_to(path)
    if config:
        known = json.loads((small_run.BASE / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("./no/such/folder", ["model ./no/such/folder: no such folder; check model.name"]),
        ("nobody/no-such-model", ["model nobody/no-such-model", "check model.name"]),
        ("what is this?", ["model what is this?", "neither a folder here nor"]),
    ],
)
def test_an_unknown_model_is_named(coordinator, name, parts):
    assert_said(coordinator(model={"name": name}), 4, *parts)


def test_an_unsupported_architecture_is_refused_with_the_supported_ones(coordinator, tmp_path):
    base = copied_base(tmp_path / "opt", model_type="opt")
    said = coordinator(model={"name": str(base)})
    assert_said(said, 4, "models of type 'opt' are not supported", "gpt2, llama, qwen2, qwen3")


def test_a_model_without_a_tokenizer_is_refused_with_how_to_make_one(coordinator, tmp_path):
    base = copied_base(tmp_path / "mute", without="tokenizer.json")
    assert_said(coordinator(model={"name": str(base)}), 4, "tokenizer.json is missing", "make it")


def test_a_model_without_weights_is_refused(coordinator, tmp_path):
    base = copied_base(tmp_path / "empty", without="model.safetensors")
    assert_said(coordinator(model={"name": str(base)}), 4, str(base), "safetensors")


# --- the plan -------------------------------------------------------------------------------------


def test_a_split_layer_out_of_range_is_refused_for_the_device_it_was_given_to(coordinator):
    plan = {"devices": {"nano": {"split_layer": 7}}}
    assert_said(coordinator(plan=plan), 5, "plan.devices.nano", "split layer 7", "1 to 6")
    assert_said(coordinator(plan={"split_layer": 9}), 5, "split layer 9", "1 to 6")


def test_a_rank_out_of_range_is_refused(coordinator):
    said = coordinator(lora={"r": 500})
    assert_said(said, 5, "rank 500 for transformer.h.0.", "choose at most 192")
    plan = {"devices": {"nano": {"split_layer": 1, "r": 300}}}
    assert_said(coordinator(plan=plan), 5, "plan.devices.nano: rank 300")
    assert_said(coordinator(lora={"r": -1}), 2, "lora.r", "greater than or equal to 0")


def test_a_target_module_that_does_not_exist_is_refused_with_those_that_do(coordinator):
    said = coordinator(lora={"target_modules": ["q_proj"]})
    assert_said(said, 5, "target module 'q_proj' does not exist", "attn.c_attn", "mlp.c_fc")


# --- settings -------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_file_line_and_the_likely_one(coordinator, tmp_path):
    said = coordinator(rounds={"cuont": 3})
    line = (tmp_path / "run.yaml").read_text().splitlines().index("  cuont: 3") + 1
    place = f"{tmp_path / 'run.yaml'}, line {line}"
    assert_said(said, 2, "rounds.cuont", place, "unknown key; did you mean rounds.count?")


def test_a_wrong_variable_is_named_with_the_likely_one(agent, coordinator, monkeypatch):
    monkeypatch.setenv("HSPLIT_BROKER__URI", "mqtt://localhost")
    for said in (agent(), coordinator()):
        assert_said(said, 2, "HSPLIT_BROKER__URI", "did you mean broker.url?")


def test_a_value_of_the_wrong_kind_is_named(agent, coordinator):
    assert_said(agent("--memory-limit", "lots"), 2, "memory_limit (--memory-limit)")
    assert_said(agent("--broker", "http://localhost"), 2, "broker.url (--broker)", "mqtt://host")
    assert_said(coordinator(optimizer={"learning_rate": "fast"}), 2, "optimizer.learning_rate")


@pytest.mark.parametrize("start", [agent_main, coordinator_main])
def test_an_unknown_flag_is_named(start):
    ended = start("run", "run.yaml", "--folower", "x")
    assert ended.code == 2
    assert "--folower" in ended.words


def test_a_missing_settings_file_is_named(tmp_path):
    missing = tmp_path / "nowhere.yaml"
    assert_said(coordinator_main("run", str(missing)), 2, str(missing), "cannot be read")


def test_two_coordinators_are_kept_out_of_one_run_folder(coordinator, tmp_path):
    folder = tmp_path / "runs" / "test"
    with run_folder.locked(folder):
        said = coordinator()
    assert_said(said, 2, "another coordinator is at work", str(folder), "another run.id")


def test_exporting_from_no_run_is_refused(tmp_path):
    assert_said(coordinator_main("export", str(tmp_path)), 2, f"{tmp_path} is no run folder")


# --- the broker -----------------------------------------------------------------------------------


def test_a_broker_that_is_not_there_is_named(agent, coordinator):
    for said in (agent(), coordinator()):
        assert_said(said, 11, "no broker answers at mqtt://127.0.0.1:", "Check that it runs")


def test_an_address_where_no_broker_speaks_is_not_waited_for_in_vain(agent):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        said = agent("--broker", f"mqtt://127.0.0.1:{mute.getsockname()[1]}")
    assert_said(said, 11, "connected, but got no answer")


def test_a_taken_port_is_named_with_what_to_do(coordinator):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = coordinator(broker=None, embedded_broker={"port": port})
    assert_said(said, 17, f"127.0.0.1:{port}", "another program listens", "embedded_broker.port")


@pytest.fixture
def guarded(tmp_path) -> Iterator[str]:
    """A broker that knows one user."""
    passwords = write_passwords(tmp_path, nano="right")
    with Mosquitto(tmp_path, allow_anonymous="false", password_file=str(passwords)) as broker:
        yield broker.url


@pytest.mark.broker
def test_a_broker_that_refuses_says_why(guarded, agent, coordinator, monkeypatch):
    assert_said(agent("--broker", guarded), 12, "anonymous user", "Check broker.username")
    assert_said(coordinator("--broker", guarded), 12, "anonymous user", "broker.password_file")
    monkeypatch.setenv("HSPLIT_BROKER__PASSWORD", "a wrong one")
    said = agent("--broker", guarded, "--username", "nano")
    assert_said(said, 12, "user 'nano'", guarded, "HSPLIT_BROKER__PASSWORD")
    assert "a wrong one" not in said.words


@pytest.mark.broker
def test_an_agent_stops_where_another_protocol_version_is_spoken(agent, tmp_path):
    nano = DeviceId("nano")
    with Mosquitto(tmp_path) as broker, noise.Stranger(broker.url) as newer:
        newer.answer(device_topic(nano, "requests"), device_topic(nano, "commands"),
                     noise.of_version(9))  # fmt: skip
        said = agent("--broker", broker.url)
    assert_said(said, 15, "protocol version 9, this side speaks 1: upgrade the older side")


# --- health ---------------------------------------------------------------------------------------


def test_health_of_nothing_is_unhealthy(tmp_path):
    assert_said(agent_main("health", "--state", str(tmp_path)), 20, str(tmp_path))
    assert_said(coordinator_main("health", "--run-folder", str(tmp_path)), 20, str(tmp_path))


def test_what_is_wrong_is_said_in_one_line(agent):
    assert len(re.findall(r"(?m)^.+$", agent("--broker", "nonsense").words)) == 1
