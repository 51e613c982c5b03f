"""A run of tiny steps that goes on until somebody stops it, with real programs, and a watch on it.

Three unequal devices with fixed parts, of which two are enough: so that one may be lost.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from coordinator import checkpoints, run_folder
from shared.protocol.topics import parse
from tests.support.brokers import Mosquitto
from tests.support.simulation import write_model, write_text
from tests.testbed.system import Process, System

DEVICES = ("nano", "orin", "pi")
PLANS: Mapping[str, Mapping[str, Any]] = {
    "nano": {"split_layer": 1, "r": 2},
    "orin": {"split_layer": 3, "r": 8},
    "pi": {"split_layer": 2, "r": 4},
}
BLOCKS = 4
LINES = 200
JOINED = "joined run"
READY = "ready for devices"
"""What the coordinator says when its start-up is done."""


class Step(NamedTuple):
    """One closed optimizer step; ``wall_s``: when, in seconds since 1970."""

    wall_s: float
    round: int
    step: int


@dataclass(frozen=True, slots=True)
class Files:
    """What the programs read."""

    base: Path
    text: Mapping[str, Path]


def write_files(folder: Path) -> Files:
    """Write a random tiny model, and text for each device."""
    base = write_model(folder / "base", "gpt2", n_layer=BLOCKS)
    text = {
        device: write_text(folder / f"{device}.jsonl", lines=LINES, seed=number)
        for number, device in enumerate(DEVICES)
    }
    return Files(base, text)


def settings(files: Files, *, rounds: int, steps: int, **changes: Any) -> dict[str, Any]:
    """Return a ``run.yaml``; ``changes`` replace whole sections."""
    return {
        "model": {"name": str(files.base)},
        "devices": {"min": 2, "expected": 3},
        "plan": {
            "batch": 4,
            "micro_batch": 2,
            "probe_sequences": 0,
            "adapt": False,
            "devices": dict(PLANS),
        },
        "rounds": {"count": rounds, "steps": steps},
        "lora": {"r": 4, "target_modules": ["c_attn", "c_fc"]},
        "optimizer": {"name": "sgd", "learning_rate": 1e-3},
        "training": {"max_length": 48, "wire_dtype": "float32"},
        "threads": 1,
        **changes,
    }


class StepLog:
    """Reads the steps of a metrics.jsonl that grows, and that a restart replaces."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: list[Step] = []
        self._read_bytes = 0
        self._inode = 0

    def read(self) -> Sequence[Step]:
        """Return the steps that were closed so far, without those that a restart took back."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._read_bytes = inode, 0
                self._steps.clear()
            file.seek(self._read_bytes)
            whole = file.read().rpartition(b"\n")
            self._read_bytes += len(whole[0]) + len(whole[1])
            lines = map(json.loads, whole[0].splitlines())
            self._steps += [
                Step(line["time"], line["round"], line["step"])
                for line in lines
                if "train/loss" in line
            ]
        return self._steps


class LongRun:
    """The programs of one run, and what they have done so far. Belongs to one thread."""

    def __init__(self, system: System, files: Files, settings: Mapping[str, Any]) -> None:
        self.system = system
        self._files = files
        self._settings = settings
        self._starts: Counter[str] = Counter()
        self.steps = StepLog(system.run_folder / "metrics.jsonl")
        self.coordinator: Process
        self.agents: dict[str, Process] = {}

    def start_coordinator(self, *flags: str) -> Process:
        """Start it for the first time, or again."""
        number = self._starts["coordinator"]
        self._starts["coordinator"] += 1
        self.coordinator = self.system.coordinator(self._settings, *flags, number=number)
        return self.coordinator

    def start_agent(self, device: str, *flags: str) -> Process:
        """Start an agent for the first time, or again: with the same folders, and another log."""
        start = f"{device}-{self._starts[device]}"
        self._starts[device] += 1
        text = self._files.text[device]
        state = self.system.folder / device
        self.agents[device] = self.system.agent(
            device,
            text,
            *("--threads", "1", "--evaluation-fraction", "0.01"),
            *("--state-folder", str(state), "--cache-folder", str(state / "cache")),
            *flags,
            name=start,
        )
        return self.agents[device]

    def first_after(self, wall_s: float) -> Step | None:
        """Return the first step that was closed after this moment, if one was."""
        steps = self.steps.read()
        place = bisect.bisect_right(steps, wall_s, key=lambda step: step.wall_s)
        return steps[place] if place < len(steps) else None

    def checkpoint_round(self) -> int | None:
        """Return the round of the newest whole checkpoint."""
        found = checkpoints.latest(self.system.run_folder / run_folder.CHECKPOINTS)
        return None if found is None else found.round


@contextlib.contextmanager
def over_mosquitto(folder: Path) -> Iterator[tuple[System, Mosquitto]]:
    """Yield a system, and its broker, which may be killed and started again."""
    folder.mkdir(parents=True, exist_ok=True)
    with Mosquitto(folder) as broker, System(folder / "system", broker.url) as system:
        yield system, broker


class Traffic:
    """Counts what passes the broker for each device, by what it is. A context manager.

    paho's network thread counts; any thread may read.
    """

    def __init__(self, port: int) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._last_s: dict[tuple[str, str], float] = {}
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe("hsplit/#", qos=0)
        self._client.on_message = self._count
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def bytes_of(self, device: str, kind: str) -> int:
        """Return the payload bytes so far on this topic of a device."""
        with self._lock:
            return self._bytes[device, kind]

    def last_s(self, device: str, kind: str) -> float:
        """Return when something last came on this topic of a device, in seconds since 1970."""
        with self._lock:
            return self._last_s.get((device, kind), 0.0)

    def _count(self, _client: object, _userdata: object, message: paho.MQTTMessage) -> None:
        address = parse(message.topic)
        if address is not None:
            key = (str(address.device), str(address.kind))
            with self._lock:
                self._bytes[key] += len(message.payload)
                self._last_s[key] = time.time()


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 120.0) -> None:
    """Look again and again until it is so, every 10 ms.

    Raises:
        TimeoutError: it was not within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.01)
