"""The process that `coordinator.embedded_broker` starts: mosquitto, or amqtt in Python."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal, NoReturn, TypeAlias

from shared.errors import ConfigError

Kind: TypeAlias = Literal["mosquitto", "amqtt"]
Preference: TypeAlias = Literal["auto", "mosquitto", "amqtt"]

# Debian and Homebrew put it where an ordinary user's PATH does not look.
_MOSQUITTO_FOLDERS = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"

# The same as in docker/mosquitto/mosquitto.conf, which gives the reasons; a test compares.
MOSQUITTO_LIMITS = """\
set_tcp_nodelay true
max_packet_size 2097152
max_inflight_messages 64
max_queued_messages 0
max_queued_bytes 134217728
queue_qos0_messages false
persistence false
memory_limit 4294967296
max_keepalive 120
"""


def choose(prefer: Preference) -> Kind:
    """Return the broker to run: the one preferred, mosquitto before amqtt.

    Raises:
        ConfigError: the broker asked for, or any at all, is not installed.
    """
    has_mosquitto = mosquitto_path() is not None
    if prefer == "mosquitto" and not has_mosquitto:
        raise ConfigError(
            "embedded_broker.prefer is mosquitto, which is not installed: install it, "
            "or set embedded_broker.prefer to auto"
        )
    if has_mosquitto and prefer != "amqtt":
        return "mosquitto"
    if importlib.util.find_spec("amqtt") is None:
        raise ConfigError(
            "there is no broker to start: install mosquitto, or `pip install "
            "'hsplit[coordinator]'`, or name a running broker in broker.url"
        )
    return "amqtt"


def mosquitto_path() -> str | None:
    """Return where mosquitto is installed; None where it is not."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_MOSQUITTO_FOLDERS)


def bracketed(host: str) -> str:
    """Return a host as it stands before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def main(argv: Sequence[str] | None = None) -> int:
    """Run a broker in this process (amqtt) or as its only child (mosquitto) until stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m coordinator.embedded_broker", description=main.__doc__
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--prefer", choices=("auto", "mosquitto", "amqtt"), default="auto")
    parser.add_argument("--stop-with-stdin", action="store_true", help="stop when stdin ends")
    options = parser.parse_args(argv)
    if options.stop_with_stdin:
        threading.Thread(target=_stop_with_stdin, daemon=True).start()
    executable = mosquitto_path()
    try:
        if choose(options.prefer) == "mosquitto" and executable is not None:
            return _run_mosquitto(executable, options.host, options.port)
        return _run_amqtt(options.host, options.port)
    except KeyboardInterrupt:
        return 130
    except ConfigError as error:
        parser.exit(error.exit_code, f"{error}\n")


def _stop_with_stdin() -> None:
    """Stop this process when its starter closes the pipe, or dies."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _run_mosquitto(executable: str, host: str, port: int) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(f"listener {port} {host}\nallow_anonymous true\nlog_type error\n")
        file.write(MOSQUITTO_LIMITS)
        file.flush()
        # Before the start, or a stop that comes at once would leave mosquitto behind.
        signal.signal(signal.SIGTERM, _exit)
        broker = subprocess.Popen([executable, "-c", file.name])
        try:
            return broker.wait()
        finally:
            broker.terminate()
            broker.wait()


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _run_amqtt(host: str, port: int) -> int:
    for name in ("amqtt", "transitions"):  # each client it does not like is a page of log
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return asyncio.run(_serve_amqtt(host, port))


async def _serve_amqtt(host: str, port: int) -> int:
    broker = _mended_broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{bracketed(host)}:{port}"}},
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
            },
        }
    )
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await broker.start()
    await stopped.wait()
    await broker.shutdown()
    return 0


def _mended_broker(config: dict[str, Any]) -> Any:
    """Return an amqtt broker without two faults of its own.

    It formats ``repr(payload)`` for each message in an eager f-string that nobody reads: 82 %
    of its time with large payloads. A payload with a short ``repr`` makes it six times faster.

    It sends each client that connects what is retained for anybody's subscriptions, while it
    iterates over those: when another client subscribes meanwhile, that iteration fails and
    the connection is cut, after what came on it was acknowledged.
    """
    from amqtt.broker import Broker  # noqa: PLC0415 (optional, and only the child needs it)

    class MendedBroker(Broker):  # type: ignore[misc,unused-ignore]
        async def _broadcast_message(
            self, session: Any, topic: Any, data: Any, force_qos: int | None = None
        ) -> None:
            quiet = _Payload(data) if data else data
            await super()._broadcast_message(session, topic, quiet, force_qos)

        async def _publish_retained_messages_for_subscription(
            self, subscription: tuple[str, int], session: Any
        ) -> None:
            subscribed = self._subscriptions.get(subscription[0], ())
            if any(one is session for one, _ in subscribed):
                await super()._publish_retained_messages_for_subscription(subscription, session)

    return MendedBroker(config)


class _Payload(bytes):
    """Bytes that say how many they are, not which."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"
