"""The demo's agents: one process for each shard, watched, and none left behind."""

from __future__ import annotations

import _thread
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from coordinator import demo as material
from shared.errors import HsplitError
from shared.terms import LabelMode

STOP_TIMEOUT_S = 15.0
LOOK_EVERY_S = 0.2
GRACE_S = 1.0
"""A run that fails tells its agents, which then fail too: its own error says more than theirs."""

_ALARM = signal.SIGUSR1


class _AgentEnded(BaseException):
    """An agent failed. No `Exception`: nothing inside the block should catch it."""


@dataclass(frozen=True, slots=True)
class _Agent:
    device: str
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def running(folder: Path, broker_url: str, *, labels: LabelMode) -> Iterator[None]:
    """Run one agent for each shard around the block; then wait for them, and stop the rest.

    For the main thread only. An agent that fails ends the block at once.

    Raises:
        HsplitError: an agent failed; the message holds the last line of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    agents: list[_Agent] = []
    try:
        for shard in material.shards():
            path = folder / f"{shard.device}.log"
            with path.open("wb") as log:
                command = _command(shard, broker_url, folder / shard.device, labels=labels)
                process = subprocess.Popen(command, stdout=log, stderr=log)
            agents.append(_Agent(shard.device, process, path))
        with _watched(agents):
            yield
        for agent in agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.process.wait(timeout=STOP_TIMEOUT_S)
    finally:
        _stop(agents)


@contextlib.contextmanager
def _watched(agents: list[_Agent]) -> Iterator[None]:
    """End the block where an agent fails."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_EVERY_S):
            if _failed(agents) is not None:
                if not done.wait(GRACE_S):
                    _thread.interrupt_main(_ALARM)
                return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if not done.is_set():
            raise _AgentEnded

    before = signal.signal(_ALARM, interrupt)
    watcher = threading.Thread(target=watch, name="agents", daemon=True)
    watcher.start()
    try:
        yield
    except _AgentEnded:
        raise _error(agents) from None
    finally:
        done.set()
        watcher.join()
        signal.signal(_ALARM, before)


def _failed(agents: list[_Agent]) -> _Agent | None:
    return next((agent for agent in agents if agent.process.poll() not in (None, 0)), None)


def _error(agents: list[_Agent]) -> HsplitError:
    agent = _failed(agents)
    assert agent is not None  # that is why we are here
    lines = agent.log.read_text(errors="replace").splitlines() or ["it wrote nothing"]
    return HsplitError(
        f"agent {agent.device} ended with code {agent.process.returncode}: {lines[-1]} "
        f"(all of it in {agent.log})"
    )


def _stop(agents: list[_Agent]) -> None:
    """Stop what still runs: asked first, then killed."""
    for agent in agents:
        agent.process.terminate()
    for agent in agents:
        try:
            agent.process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            agent.process.kill()
            agent.process.wait()


def _command(
    shard: material.Shard, broker_url: str, state_folder: Path, *, labels: LabelMode
) -> list[str]:
    return [
        *(sys.executable, "-m", "edge_agent.cli", "run"),
        *("--broker", broker_url, "--device-id", shard.device),
        *("--data", str(shard.training), "--evaluation-data", str(shard.held_out)),
        *("--state-folder", str(state_folder), "--cache-folder", str(state_folder / "cache")),
        *("--backend", shard.backend, "--device", "cpu", "--threads", "1"),
        *("--emulate", shard.emulate),
        *(("--share-labels",) if labels == "server" else ()),
    ]
