"""Two runs with the same settings and text: a calm one, and one with everything in its way."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shared.protocol.messages import DeviceId, Refusal
from shared.protocol.topics import device_topic
from tests.testbed import noise, small_run
from tests.testbed.in_process import Ended, agent_main, coordinator_main
from tests.testbed.system import Process, System

SECRET = "correct-horse-battery-staple"
SECRETS = {"HSPLIT_BROKER__USERNAME": "operator", "HSPLIT_BROKER__PASSWORD": SECRET}


@dataclass
class Calm:
    """A run that nobody disturbed. ``health``: of each program while it ran."""

    system: System
    text: dict[str, small_run.Text]
    codes: dict[str, int] = field(default_factory=dict)
    health: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.system.run_folder

    @property
    def held_out(self) -> list[Path]:
        return [text.held_out for text in self.text.values()]

    def evaluations(self) -> list[float]:
        """Return the held-out losses that the run reported, in order."""
        return [line["eval/loss"] for line in self.system.metrics() if "eval/loss" in line]


@dataclass
class Disturbed(Calm):
    """What happened besides. ``guests``: the agents that may not take part, by why not.

    ``answer``: to a chunk of another protocol version. ``stopped``: the coordinator's exit
    code after SIGTERM; ``between``: its ``health`` and an ``export`` while it was down.
    """

    guests: dict[str, Ended] = field(default_factory=dict)
    answer: Refusal | None = None
    garbage: int = 0
    stopped: int | None = None
    between: list[int] = field(default_factory=list)


@contextlib.contextmanager
def calm_run(url: str, folder: Path) -> Iterator[Calm]:
    """Run it; yield when all programs have ended."""
    with System(folder, url, environment=SECRETS) as system:
        run = Calm(system, small_run.write_text(folder / "text"))
        coordinator = system.coordinator(small_run.settings())
        programs = [coordinator, *(_agent(run, device) for device in run.text)]
        system.wait_for_step(coordinator, 1)
        run.health = health(system)
        run.codes = {one.name: one.wait() for one in programs}
        yield run


@contextlib.contextmanager
def disturbed_run(url: str, folder: Path) -> Iterator[Disturbed]:
    """Run it amid garbage, with guests before the first round and a stop in the second."""
    with System(folder, url) as system, noise.Stranger(url) as stranger:
        run = Disturbed(system, small_run.write_text(folder / "text"))
        stranger.pester(noise.all_topics(list(run.text), "test"))
        first = system.coordinator(small_run.settings())
        workstation = _agent(run, "workstation")
        system.wait_for_line(first, "workstation is prepared")
        run.answer = _answer_to_version_9(stranger)
        run.guests = {
            "same id": _guest(run, "workstation", run.text["workstation"].data),
            "no memory": _guest(run, "tiny", run.text["nano"].data, "--memory-limit", "1MiB"),
            "no template": _guest(run, "chatty", write_messages(folder / "chats.jsonl")),
        }
        nano = _agent(run, "nano")
        system.wait_for_step(first, small_run.STEPS + 1)
        first.send(signal.SIGTERM)
        run.stopped = first.wait()
        run.between = [
            health(system)["coordinator"],
            coordinator_main("export", str(run.folder), "--to", str(folder / "early")).code,
        ]
        second = system.coordinator(small_run.settings(), "--resume", number=2)
        run.codes = {one.name: one.wait() for one in (second, workstation, nano)}
        run.garbage = stranger.published
        yield run


def health(system: System) -> dict[str, int]:
    """Return what ``health`` says of the coordinator and of one agent."""
    return {
        "coordinator": coordinator_main("health", "--run-folder", str(system.run_folder)).code,
        "nano": agent_main("health", "--state", str(system.folder / "nano")).code,
    }


def write_messages(path: Path) -> Path:
    """Write a file of conversations."""
    turns = [
        {"role": "user", "content": "What is The Eagle ?"},
        {"role": "assistant", "content": "The Eagle is a coffee shop ."},
    ]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    return path


def _agent(run: Calm, device: str) -> Process:
    return run.system.agent(device, run.text[device].data, *run.text[device].flags())


def _guest(run: Disturbed, device: str, data: Path, *flags: str) -> Ended:
    state = run.system.folder / f"guest-{device}"
    return agent_main(
        *("run", "--broker", run.system.broker_url, "--device-id", device, "--data", str(data)),
        *("--state-folder", str(state), "--cache-folder", str(state / "cache")),
        *flags,
    )


def _answer_to_version_9(stranger: noise.Stranger) -> Refusal:
    visitor = DeviceId("visitor")
    stranger.listen(device_topic(visitor, "commands"))
    stranger.publish(device_topic(visitor, "requests"), noise.of_version(9))
    return stranger.wait_for(device_topic(visitor, "commands"), Refusal)
