"""The real programs as processes over the broker that the coordinator brings along."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from peft import PeftModel

from coordinator.demo import run as demo
from coordinator.model_store import ModelStore
from tests.support.brokers import free_port, wait_until
from tests.testbed import large_base, small_run
from tests.testbed.in_process import coordinator_main
from tests.testbed.mosquitto_runs import write_messages
from tests.testbed.system import Process, System, with_shared_graphs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # the first test of a run waits for all of it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@contextlib.contextmanager
def embedded(folder: Path) -> Iterator[tuple[System, dict[str, object]]]:
    """Yield a system, and the settings of an embedded broker on a free port."""
    port = free_port()
    with System(folder, f"mqtt://127.0.0.1:{port}") as system:
        yield system, {"port": port}


# --- amqtt, labels on the server, bfloat16 on the wire --------------------------------------------


@pytest.fixture(scope="module")
def over_amqtt(tmp_path_factory) -> Iterator[tuple[System, small_run.Text]]:
    folder = tmp_path_factory.mktemp("amqtt")
    with embedded(folder) as (system, broker):
        text = small_run.write_text(folder / "text")["workstation"]
        settings = small_run.settings(
            broker=None,
            embedded_broker={**broker, "prefer": "amqtt"},
            devices={"min": 1, "expected": 1},
            rounds={"count": 2, "steps": 3},
            training={"max_length": 128, "labels": "server"},
        )
        coordinator = system.coordinator(settings)
        agent = system.agent("workstation", text.data, *text.flags(), "--share-labels")
        codes = [coordinator.wait(), agent.wait()]
        assert codes == [0, 0], coordinator.text() + agent.text()
        yield system, text


def test_a_run_over_amqtt_learns(over_amqtt):
    system, _ = over_amqtt
    assert "embedded broker (amqtt) at " in (system.folder / "coordinator.log").read_text()
    summary = system.summary()
    assert summary["steps"] == 6
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]


def test_its_adapter_has_the_loss_that_it_reported(over_amqtt):
    system, text = over_amqtt
    adapter = system.run_folder / "adapter"
    opened = PeftModel.from_pretrained(small_run.plain_model(), str(adapter)).eval()
    reported = [line["eval/loss"] for line in system.metrics() if "eval/loss" in line]
    ours = small_run.held_out_loss(opened, [text.held_out])
    assert ours == pytest.approx(reported[-1], rel=1e-3)


# --- whatever broker there is, a larger base, devices with one block and with all -----------------


@dataclass
class Large:
    """A run of a base large enough to weigh. ``held_bytes``: most memory, by device."""

    system: System
    base: Path
    held_bytes: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[Large]:
    folder = tmp_path_factory.mktemp("large")
    with embedded(folder) as (system, broker):
        run = Large(system, large_base.write(folder / "base"))
        plan = {"small": {"split_layer": 1}, "whole": {"split_layer": large_base.BLOCKS}}
        coordinator = system.coordinator(
            {
                "model": {"name": str(run.base)},
                "broker": None,
                "embedded_broker": broker,
                "devices": {"min": 2, "expected": 2},
                "plan": {"batch": 2, "devices": plan},
                "rounds": {"count": 1, "steps": 2},
                "lora": {"r": 4},
                "training": {"max_length": 32},
                "report_to": [],
                "threads": 1,
            }
        )
        agents = [
            system.agent("small", write_messages(folder / "chats.jsonl"), "--threads", "1"),
            system.agent("whole", write_lines(folder / "lines.jsonl"), "--threads", "1"),
        ]
        run.held_bytes = watch([coordinator, *agents])
        assert [one.wait() for one in (coordinator, *agents)] == [0, 0, 0], coordinator.text()
        yield run


def write_lines(path: Path) -> Path:
    path.write_text((json.dumps({"text": "The Eagle is a coffee shop ."}) + "\n") * 8)
    return path


def watch(programs: list[Process]) -> dict[str, int]:
    """Return the most memory that each process had, weights mapped from files included."""
    most = dict.fromkeys((one.name for one in programs), 0)

    def ended() -> bool:
        for one in programs:
            most[one.name] = max(most[one.name], one.memory_bytes("VmRSS"))
        return all(one.popen.poll() is not None for one in programs)

    wait_until(ended, "the run ends", timeout_s=90)
    return most


def test_texts_and_conversations_are_trained_on_together(large):
    devices = large.system.summary()["devices"]
    assert {name: one["split_layer"] for name, one in devices.items()} == {
        "small": 1,
        "whole": large_base.BLOCKS,
    }
    assert all(one["target_tokens"] > 0 for one in devices.values())


def test_with_an_untied_head_a_device_holds_its_front_and_the_head(large, tmp_path):
    described = ModelStore.open(str(large.base), cache_folder=tmp_path).describe()
    names = {piece.sha256: piece.name for piece in described.pieces}
    always = {"tokenizer", "embeddings", "final_norm", "head"}
    assert held(large.system, "small", names) == {*always, "block.0"}
    assert held(large.system, "whole", names) == set(names.values())


def held(system: System, device: str, names: Mapping[str, str]) -> set[str]:
    return {names[path.name] for path in (system.folder / device / "cache").iterdir()}


def test_the_memory_of_a_device_shows_that_it_holds_only_its_front(large):
    saved = large.held_bytes["whole"] - large.held_bytes["small"]
    weights = (large_base.BLOCKS - 1) * large_base.block_bytes()
    assert weights > 80e6
    assert 0.75 * weights < saved < 1.35 * weights


# --- the demo -------------------------------------------------------------------------------------


def test_the_demo_shows_a_strategy_in_which_only_adapters_travel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(with_shared_graphs(tmp_path / "cache")))
    monkeypatch.setattr(demo, "STEPS", 6)
    ended = coordinator_main(
        "demo", "--rounds", "1", "--strategy", "ffa-lora", "--folder", str(tmp_path)
    )
    assert ended.code == 0, ended.words
    (run_folder,) = tmp_path.glob("*-tiny-gpt2")
    summary = json.loads((run_folder / "summary.json").read_text())
    assert {device["split_layer"] for device in summary["devices"].values()} == {6}
    # c_attn, both c_proj and c_fc of 6 blocks of width 192, at rank 8 in float32, of 3 devices.
    adapters = 3 * 6 * 8 * 4 * 192 * (1 + 3 + 1 + 1 + 4 + 1 + 1 + 4)
    assert adapters < summary["bytes_up"] < 1.1 * adapters, "nothing else goes up"
    assert summary["perplexity_after"] < summary["perplexity_before"]


def test_the_demo_runs_and_prints_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(with_shared_graphs(tmp_path / "cache")))
    monkeypatch.setattr(demo, "STEPS", 8)  # of the 30 steps of each round
    ended = coordinator_main("demo", "--rounds", "1", "--folder", str(tmp_path))
    assert ended.code == 0, ended.words
    for part in ("workstation", "laptop", "nano", "held-out perplexity ", "MB up", "adapter: "):
        assert part in ended.output
    (run_folder,) = tmp_path.glob("*-tiny-gpt2")
    assert str(run_folder / "adapter") in ended.output
    assert (run_folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    logs = {log.stem: log.read_text() for log in (run_folder / "agents").glob("*.log")}
    assert logs.keys() == {"workstation", "laptop", "nano"}
    assert all("the run is complete" in log for log in logs.values())
