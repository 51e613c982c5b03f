"""The demo's agents are real processes: one that fails ends the demo, and none outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from coordinator.demo import agents
from shared.errors import HsplitError, QuorumError
from tests.support.brokers import wait_until
from tests.testbed.in_process import coordinator_main

WELL = "import time; time.sleep(600)"
BROKEN = "print('first words'); print('last words'); raise SystemExit(7)"
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen[bytes]]:
    """Return the processes that were started so far."""
    processes: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return processes


def instead(monkeypatch, **programs: str) -> None:
    """Let these programs take the agents' places; the others wait."""
    monkeypatch.setattr(
        agents,
        "_command",
        lambda shard, *_, labels: [sys.executable, "-c", programs.get(shard.device, WELL)],
    )


def fail_after(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    raise QuorumError("too few devices")


def wait_for_an_interruption() -> None:
    never = threading.Event()
    while True:
        never.wait(0.05)


def test_an_agent_that_fails_ends_the_block_with_its_last_words(tmp_path, monkeypatch, started):
    instead(monkeypatch, laptop=BROKEN)
    with (
        pytest.raises(HsplitError, match=r"agent laptop ended with code 7: last words \(.*log\)"),
        agents.running(tmp_path, "mqtt://x", labels="device"),
    ):
        wait_for_an_interruption()
    assert len(started) == 3
    assert all(process.returncode is not None for process in started)


def test_an_error_of_the_run_itself_stays_though_its_agents_then_fail(
    tmp_path, monkeypatch, started
):
    instead(monkeypatch, laptop=BROKEN)
    with (
        pytest.raises(QuorumError, match="too few"),
        agents.running(tmp_path, "mqtt://x", labels="device"),
    ):
        fail_after(started[1])


def test_an_agent_that_does_not_listen_is_killed(tmp_path, monkeypatch, started):
    monkeypatch.setattr(agents, "STOP_TIMEOUT_S", 0.3)
    instead(monkeypatch, workstation=DEAF)
    with agents.running(tmp_path, "mqtt://x", labels="device"):
        wait_until((tmp_path / "workstation.log").read_text, "an agent to be deaf")
    assert [process.returncode for process in started] == [-signal.SIGKILL, *[-signal.SIGTERM] * 2]


@pytest.mark.parametrize("labels", ["device", "server"])
def test_the_demos_agents_agree_only_to_what_was_asked(tmp_path, labels):
    (shard, *_) = agents.material.shards()
    command = agents._command(shard, "mqtt://x", tmp_path, labels=labels)
    assert ("--share-labels" in command) == (labels == "server")


def test_the_demo_names_the_strategies_before_it_starts_anything():
    ended = coordinator_main("demo", "--strategy=fedavg")
    assert ended.code == 2
    assert "there is no strategy 'fedavg': choose one of hsplitlora, splitlora, hlo" in ended.words
    assert "broker" not in ended.output


@pytest.mark.parametrize("rounds", ["0", "-1", "2.5", "many", ""])
def test_the_demo_has_at_least_one_round(rounds):
    ended = coordinator_main("demo", f"--rounds={rounds}")
    assert ended.code == 2
    assert f"--rounds: {rounds!r} is not a whole number from 1 on" in ended.words
