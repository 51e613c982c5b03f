"""Starts the real programs as processes, over a real broker, and waits for what they do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.brokers import wait_until
from tests.support.graph_files import cache_of_programs

ROOT = Path(__file__).resolve().parents[2]


GRAPHS = Path("hsplit", "graphs")
"""Below ``XDG_CACHE_HOME``."""


@dataclass
class Process:
    """One program under test; its output goes to ``log``."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def wait(self, timeout_s: float = 90.0) -> int:
        """Return the exit code."""
        try:
            return self.popen.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{self.name} still runs:\n{self.text()[-3000:]}") from error

    def text(self) -> str:
        """Return what it wrote so far."""
        return self.log.read_text(errors="replace")

    def send(self, signal_: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(signal_)

    def memory_bytes(self, field_: str) -> int:
        """Return a figure of ``/proc/<pid>/status`` (``RssAnon``, say); 0 once it has ended."""
        with contextlib.suppress(OSError, ValueError):
            text = Path(f"/proc/{self.popen.pid}/status").read_text()
            line = next((line for line in text.splitlines() if line.startswith(field_ + ":")), "")
            return int(line.split()[1]) * 1024 if line else 0
        return 0


@dataclass
class System:
    """A run folder's worth of processes. Use it as a context manager: it leaves none behind.

    ``settings`` of the coordinator may hold a ``broker`` of their own, or None for the embedded.
    ``shares_graphs``: whether what a coordinator exports serves other systems too, and it finds
    what they exported.
    """

    folder: Path
    broker_url: str
    environment: Mapping[str, str] = field(default_factory=dict)
    shares_graphs: bool = True
    processes: list[Process] = field(default_factory=list)

    def __enter__(self) -> System:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.shares_graphs:
            with_shared_graphs(self._home)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.kill()
            process.popen.wait(timeout=30)

    @property
    def graphs(self) -> Path:
        """Where the coordinator keeps exported graphs."""
        return self._home / GRAPHS

    @property
    def _home(self) -> Path:
        return self.folder / "home"

    @property
    def run_file(self) -> Path:
        """The settings of the coordinator's run."""
        return self.folder / "run.yaml"

    @property
    def run_folder(self) -> Path:
        """The folder of the coordinator's run."""
        return self.folder / "runs" / "test"

    def coordinator(self, settings: Mapping[str, Any], *flags: str, number: int = 0) -> Process:
        """Start ``hsplit-coordinator run`` with these settings."""
        whole = {
            "run": {"id": "test", "folder": str(self.folder / "runs")},
            "broker": {"url": self.broker_url},
            **settings,
        }
        self.run_file.write_text(yaml.safe_dump(whole))
        return self.start(
            f"coordinator{number or ''}", ["coordinator.cli", "run", str(self.run_file), *flags]
        )

    def agent(
        self,
        device: str,
        data: Path,
        *flags: str,
        name: str | None = None,
        program: Path | None = None,
    ) -> Process:
        """Start ``hsplit-agent run`` for one device; ``program``: that of another environment."""
        own = self.folder / (name or device)
        ours = [sys.executable, "-m", "edge_agent.cli"]
        return self.launch(
            name or device,
            [
                *(ours if program is None else [str(program)]),
                *("run", "--broker", self.broker_url),
                *("--device-id", device, "--data", str(data)),
                *("--state-folder", str(own), "--cache-folder", str(own / "cache")),
                *flags,
            ],
        )

    def start(self, name: str, module: Sequence[str]) -> Process:
        """Start a module of ours as a program."""
        return self.launch(name, [sys.executable, "-m", *module])

    def launch(self, name: str, command: Sequence[str]) -> Process:
        """Start any program."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "XDG_CACHE_HOME": str(self._home), **self.environment},
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def wait_for_line(self, process: Process, text: str, *, timeout_s: float = 90.0) -> None:
        """Wait until a process has written ``text``."""

        def written() -> bool:
            if process.popen.poll() is not None and text not in process.text():
                raise AssertionError(f"{process.name} ended:\n{process.text()[-3000:]}")
            return text in process.text()

        wait_until(written, f"{process.name} to write {text!r}", timeout_s=timeout_s)

    def wait_for_step(self, process: Process, step: int, *, timeout_s: float = 90.0) -> None:
        """Wait until the coordinator ``process`` has closed the run's step ``step`` (from 1)."""

        def closed() -> bool:
            if process.popen.poll() is not None:
                raise AssertionError(f"{process.name} ended:\n{process.text()[-3000:]}")
            path = self.run_folder / "metrics.jsonl"
            return path.exists() and any(
                line.get("step", 0) >= step and "train/loss" in line for line in self.metrics()
            )

        wait_until(closed, f"{process.name} to close step {step}", timeout_s=timeout_s)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the run's metrics.jsonl."""
        whole = (self.run_folder / "metrics.jsonl").read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def summary(self) -> dict[str, Any]:
        """Return the run's summary.json."""
        with contextlib.suppress(FileNotFoundError):
            summary: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
            return summary
        raise AssertionError("the run left no summary.json")


def with_shared_graphs(home: Path) -> Path:
    """Return ``home`` for an ``XDG_CACHE_HOME`` whose graphs are those of all such."""
    graphs = home / GRAPHS
    graphs.parent.mkdir(parents=True, exist_ok=True)
    if not graphs.is_symlink():
        graphs.symlink_to(cache_of_programs(), target_is_directory=True)
    return home


@contextlib.contextmanager
def broker(folder: Path) -> Iterator[str]:
    """Run a mosquitto of its own with the shipped configuration; yield its URL."""
    from tests.support.brokers import Mosquitto

    with Mosquitto(folder) as mosquitto:
        yield mosquitto.url
