"""Real brokers for tests: mosquitto with the configuration that docker/ ships, and amqtt."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from coordinator.broker_process import mosquitto_path
from coordinator.embedded_broker import EmbeddedBroker

SHIPPED_CONF = Path(__file__).parents[2] / "docker" / "mosquitto" / "mosquitto.conf"
TLS_CONF = SHIPPED_CONF.with_name("mosquitto-tls.conf")
REQUIRED = "HSPLIT_REQUIRE_BROKER"
START_TIMEOUT_S = 10.0


def require_mosquitto() -> str:
    """Return mosquitto's path; skip the test, or fail where the environment demands it."""
    return _required("mosquitto", mosquitto_path())


def require_program(name: str) -> str:
    """Return a program's path; skip the test, or fail where the environment demands it."""
    return _required(name, shutil.which(name))


def _required(name: str, path: str | None) -> str:
    if path is None:
        reason = f"{name} is not installed"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason}, and {REQUIRED}=1", pytrace=False)
        pytest.skip(reason)
    return path


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Tell whether somebody accepts connections on this loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 10.0) -> None:
    """Look again and again until ``condition`` holds; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {what}")
        pause.wait(0.02)


def adapted(conf: str, settings: Mapping[str, str]) -> str:
    """Return a mosquitto configuration with these settings replaced, or added at the end."""
    for key, value in settings.items():
        conf, count = re.subn(rf"(?m)^{key} .*$", f"{key} {value}", conf)
        if count == 0:
            conf += f"{key} {value}\n"
    return conf


class Mosquitto:
    """A mosquitto on a loopback port, with a shipped configuration but for ``settings``.

    A context manager. It may be killed and started again on the same port.
    """

    kind = "mosquitto"

    def __init__(
        self, folder: Path, *, scheme: str = "mqtt", conf: Path = SHIPPED_CONF, **settings: str
    ) -> None:
        self.port = free_port()
        self.url = f"{scheme}://localhost:{self.port}"
        self.log = folder / "mosquitto.log"
        self._executable = require_mosquitto()
        self._shipped = conf
        self._conf = folder / "mosquitto.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self.configure(**settings)

    def configure(self, **settings: str) -> None:
        """Write the configuration that the next start uses."""
        own = {"listener": f"{self.port} 127.0.0.1"}
        if os.geteuid() == 0:
            own["user"] = "root"  # it would leave root and then not read pytest's folders
        self._conf.write_text(adapted(self._shipped.read_text(), {**own, **settings}))

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._executable, "-c", str(self._conf)], stdout=log, stderr=subprocess.STDOUT
            )
        process = self._process
        wait_until(lambda: process.poll() is not None or listens(self.port), "mosquitto listens")
        if process.poll() is not None:
            pytest.fail(f"mosquitto ended:\n{self.output()}")

    @property
    def pid(self) -> int:
        """The process that runs now."""
        assert self._process is not None  # it was started
        return self._process.pid

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text()

    def kill(self) -> None:
        """Kill it as a crash would; may be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Amqtt:
    """The embedded broker in its Python form, with `Mosquitto`'s interface."""

    kind = "amqtt"

    def __init__(self) -> None:
        self._broker = EmbeddedBroker(prefer="amqtt")

    @property
    def url(self) -> str:
        return self._broker.url

    def __enter__(self) -> Amqtt:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self._broker.start()

    def output(self) -> str:
        """Return what it has printed since its last start."""
        return self._broker.printed()

    def kill(self) -> None:
        self._broker.stop()


def write_passwords(folder: Path, **users: str) -> Path:
    """Return a mosquitto password file for these users."""
    file = folder / "passwords"
    file.write_text("".join(f"{user}:{password}\n" for user, password in users.items()))
    file.chmod(0o600)
    subprocess.run([require_program("mosquitto_passwd"), "-U", str(file)], check=True)
    return file
