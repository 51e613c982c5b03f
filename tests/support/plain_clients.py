"""`mosquitto_pub` and `mosquitto_sub` as a user of a guarded broker: clients that obey no rule."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.brokers import Mosquitto, require_program, wait_until

ATTACKER = "attacker"


@dataclass(frozen=True)
class PlainClient:
    """Who we are to a broker, in the clients' own flags; ``version``: mqttv5 or mqttv311."""

    broker: Mosquitto
    flags: tuple[str, ...]
    version: str = "mqttv5"

    def command(self, program: str, *arguments: str) -> list[str]:
        """Return the command line of one of the two programs."""
        return [
            *(require_program(program), "-h", "localhost", "-p", str(self.broker.port)),
            *("-V", self.version, *self.flags, *arguments),
        ]

    def publish(self, topic: str, text: str = "x", *more: str) -> int:
        """Publish once; return the exit code, which is 0 where a broker drops it silently."""
        return self.try_to_publish(topic, "-m", text, *more).returncode

    def try_to_publish(self, topic: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Publish with these flags; return the exit code and all that was printed."""
        command = self.command("mosquitto_pub", "-q", "1", "-t", topic, *more)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)

    @contextmanager
    def subscribed(
        self, topics: Sequence[str], *more: str, count: int | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """Subscribe, and yield once the broker has answered; ``count``: end after so many.

        What it prints are topics. The broker must have ``log_type all``.
        """
        subscriptions = [word for topic in topics for word in ("-t", topic)]
        limit = () if count is None else ("-C", str(count))
        command = self.command(
            "mosquitto_sub", "-i", ATTACKER, "-q", "1", *subscriptions, "-F", "%t", *limit, *more
        )
        answered = f"Sending SUBACK to {ATTACKER}\n"
        before = self.broker.output().count(answered)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                wait_until(lambda: self.broker.output().count(answered) > before, "a SUBACK")
                yield process
            finally:
                process.kill()


def with_password(folder: Path) -> tuple[str, ...]:
    """Return the flags of a user with the password that stands in an enrolled folder."""
    password = (folder / "password").read_text().strip()
    return ("--cafile", str(folder / "ca.crt"), "-u", folder.name, "-P", password)


def with_certificate(folder: Path) -> tuple[str, ...]:
    """Return the flags of a user with the certificate in an enrolled folder."""
    cert, key = str(folder / "client.crt"), str(folder / "client.key")
    return ("--cafile", str(folder / "ca.crt"), "--cert", cert, "--key", key)
