"""An agent that stops amid a round comes back cheaply; one that is too slow holds up nobody.

What happens to the run when processes, links and brokers die is shown in `chaos`; how long it
takes is `bench_recovery`'s. Here every wait is for a state.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from coordinator.metrics import SUMMARY_FILE
from tests.support.brokers import wait_until
from tests.testbed.long_run import LongRun, Traffic, over_mosquitto, settings, write_files
from tests.testbed.system import Process, System

DEVICE = "nano"


def stopped(run: LongRun, agent: Process, number: signal.Signals) -> int:
    """Ask an agent to stop while it trains; return its exit code."""
    before = run.coordinator.text()
    agent.send(number)
    code = agent.wait()
    said = f"{DEVICE} is gone: stopped"
    wait_until(lambda: said in run.coordinator.text()[len(before) :], said, timeout_s=60)
    return code


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.timeout(300)  # programs start as slowly as a busy machine lets them
def test_an_agent_that_is_stopped_says_goodbye_and_later_trains_with_what_it_kept(tmp_path: Path):
    files = write_files(tmp_path)
    alone = settings(files, rounds=10_000, steps=5, devices={"min": 1, "expected": 1})
    with over_mosquitto(tmp_path) as (system, broker), Traffic(broker.port) as traffic:
        run = LongRun(system, files, alone)
        coordinator, first = run.start_coordinator(), run.start_agent(DEVICE)
        system.wait_for_step(coordinator, 1)
        fetched = traffic.bytes_of(DEVICE, "weights")
        assert fetched > sum(path.stat().st_size for path in weights(system.folder / DEVICE))
        assert stopped(run, first, signal.SIGTERM) == 143

        # A round that its only device left is void: what it measured may be gone by now.
        closed = max((step.step for step in run.steps.read()), default=0)
        second = run.start_agent(DEVICE)
        system.wait_for_step(coordinator, closed + 5)
        assert traffic.bytes_of(DEVICE, "weights") == fetched, "its own are as good as new ones"
        assert stopped(run, second, signal.SIGINT) == 130
        assert "fell silent" not in coordinator.text()


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.timeout(300)  # programs start as slowly as a busy machine lets them
def test_a_device_behind_a_slow_link_is_left_out_and_the_others_go_on(tmp_path: Path):
    """It lives, it answers, and each of its answers takes longer than a round waits."""
    files = write_files(tmp_path)
    rules = {"min": 1, "expected": 2, "wait_s": 300.0, "step_timeout_s": 1.0}
    with over_mosquitto(tmp_path) as (system, _):
        run = LongRun(system, files, settings(files, rounds=2, steps=2, devices=rules))
        coordinator, quick = run.start_coordinator(), run.start_agent("orin")
        slow = run.start_agent(DEVICE, "--emulate", "latency=1500ms")
        assert [program.wait() for program in (coordinator, quick, slow)] == [0, 0, 0]
        assert f"{DEVICE} is late: left out after" in coordinator.text()
        assert "fell silent" not in coordinator.text()
        tokens = {name: one["target_tokens"] for name, one in summary_of(system).items()}
    assert tokens["orin"] > 0
    assert tokens.get(DEVICE, 0) == 0


def summary_of(system: System) -> Mapping[str, Any]:
    """Return what the run's summary says of each device."""
    found = json.loads((system.run_folder / SUMMARY_FILE).read_text())["devices"]
    return cast("Mapping[str, Any]", found)


def weights(state: Path) -> list[Path]:
    """Return the files of base weights that an agent keeps."""
    found = [path for path in (state / "cache").iterdir() if path.is_file()]
    assert found
    return found
