"""The broker for when none is configured: for trials and demos, in a process of its own.

A ``mosquitto`` on the machine is preferred; else it is amqtt, in Python. Anybody who reaches
the port may use it, without password: it listens on the loopback interface unless told
otherwise, and is no broker for a network one does not trust. For that, run mosquitto with
``docker/mosquitto/mosquitto.conf`` and name it in ``broker.url``.

``python -m coordinator.embedded_broker --port 1883`` runs one by hand.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from coordinator.broker_process import Kind, Preference, bracketed, choose, main
from shared.errors import BrokerUnreachableError, ConfigError, PortTakenError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
_PROBE_INTERVAL_S = 0.05
# CONNECT of MQTT 3.1.1: clean session, keepalive 10 s, client id "probe"; and its acceptance.
_CONNECT = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x0a\x00\x05probe"
_ACCEPTED = b"\x20\x02\x00\x00"
_DISCONNECT = b"\xe0\x00"


class EmbeddedBroker:
    """A broker in a child process, which ends when this object, or this process, does.

    Use it as a context manager: inside, ``url`` accepts connections and ``kind`` says which
    broker it is. ``port`` 0 takes any free port.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, prefer: Preference = "auto"
    ) -> None:
        """Choose the broker; nothing is started yet.

        Raises:
            ConfigError: the broker asked for, or any at all, is not installed.
        """
        self.host = host
        self.port = port
        self.kind: Kind = choose(prefer)
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine finds the broker; known once it has started."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"mqtt://{bracketed(host)}:{self.port}"

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the broker and return when it accepts MQTT connections.

        Raises:
            PortTakenError: another program listens there.
            ConfigError: the host is not one of this machine's, or the port may not be used.
            BrokerUnreachableError: it did not come up; the message holds its last words.
        """
        self.port = _free_port(self.host, self.port)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        command = [sys.executable, "-m", "coordinator.embedded_broker", "--stop-with-stdin"]
        options = ["--host", self.host, "--port", str(self.port), "--prefer", self.kind]
        self._process = subprocess.Popen(
            command + options,
            # The module must be found wherever this program was started; stdin's end is how
            # the child learns that we are gone, even when we are killed.
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for us: we close the broker last
        )
        try:
            self._await_answer(self._process)
        except BaseException:
            self.stop()
            raise
        _announce(self)

    def stop(self) -> None:
        """Stop the broker; may be called twice, and before `start`."""
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._output is not None:
            self._output.close()

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(self.host, self.port):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PROBE_INTERVAL_S)
                raise self._failed(f"ended with exit code {process.returncode}")
            if time.monotonic() > deadline:
                raise self._failed(f"did not answer within {START_TIMEOUT_S:g} s")

    def printed(self) -> str:
        """Return what the child has printed since its start: nothing, if all is well."""
        if self._output is None or self._output.closed:
            return ""
        # Not read(): the child writes at the same file position, which that would move.
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace").strip()

    def _failed(self, what: str) -> BrokerUnreachableError:
        words = self.printed()[-2000:] or "it printed nothing"
        return BrokerUnreachableError(
            f"the embedded {self.kind} at {self.host}:{self.port} {what}: {words}"
        )


def _announce(broker: EmbeddedBroker) -> None:
    logger.info(
        "embedded broker (%s) at %s: for trials; for a real run set broker.url to a mosquitto "
        "with passwords and TLS",
        broker.kind,
        broker.url,
    )
    if not _is_loopback(broker.host):
        logger.warning(
            "the embedded broker listens on %s without passwords: everybody in that network can "
            "join the run and read what is sent",
            broker.host or "all addresses",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port(host: str, port: int) -> int:
    """Return ``port``, or a free one for 0, having seen that it can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(
                f"cannot start the embedded broker: another program listens on {host}:{port}. "
                "Set embedded_broker.port to a free port (0 takes any), or, if that program is "
                f"a broker to be used, set broker.url to mqtt://{bracketed(host)}:{port}"
            ) from error
        raise ConfigError(
            f"the embedded broker cannot listen on {host}:{port}: {error.strerror or error}. "
            "Check embedded_broker.host and embedded_broker.port"
        ) from error


def _answers(host: str, port: int) -> bool:
    """Tell whether a broker accepts an MQTT connection there now."""
    try:
        with socket.create_connection((host or "127.0.0.1", port), timeout=1.0) as link:
            link.sendall(_CONNECT)
            answer = link.recv(len(_ACCEPTED))
            if answer == _ACCEPTED:
                link.sendall(_DISCONNECT)
            return answer == _ACCEPTED
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
