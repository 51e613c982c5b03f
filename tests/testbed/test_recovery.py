"""An agent that is asked to stop in the midst of a round stops cleanly, and comes back cheaply.

What happens to the run when processes, links and brokers die is shown in `chaos`; how long it
takes is `bench_recovery`'s. Here every wait is for a state.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.brokers import wait_until
from tests.testbed.long_run import LongRun, Traffic, over_mosquitto, settings, write_files
from tests.testbed.system import Process

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


def weights(state: Path) -> list[Path]:
    """Return the files of base weights that an agent keeps."""
    found = [path for path in (state / "cache").iterdir() if path.is_file()]
    assert found
    return found
