"""Brokers as fixtures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.config import BrokerSettings
from shared.protocol.topics import Filter
from shared.transport.base import LinkUp, Will
from shared.transport.mqtt import MqttTransport
from tests.broker.events import Connect
from tests.support.brokers import TLS_CONF, Amqtt, Mosquitto

README = TLS_CONF.parents[1] / "README.md"


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path) as broker:
        yield broker


@pytest.fixture(params=[pytest.param("mosquitto", marks=pytest.mark.broker), "amqtt"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mosquitto | Amqtt]:
    with Mosquitto(tmp_path) if request.param == "mosquitto" else Amqtt() as running:
        yield running


@pytest.fixture(scope="session")
def credentials_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `enroll` makes for coordinator, nano and orin, with the commands of the README."""
    folder = tmp_path_factory.mktemp("enrolled")
    (block,) = re.findall(r"(?s)```bash\n(hsplit-coordinator enroll .*?)```", README.read_text())
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-euc", block.replace("broker.example", "localhost")],
        cwd=folder,
        env={**os.environ, "PATH": programs},
        check=True,
        capture_output=True,
    )
    return folder / "credentials"


@pytest.fixture(scope="session")
def broker_files(credentials_folder: Path) -> dict[str, str]:
    """What mosquitto-tls.conf names, from there: settings for `Mosquitto`."""
    broker = credentials_folder / "broker"
    return {
        "cafile": str(broker / "certs" / "ca.crt"),
        "certfile": str(broker / "certs" / "server.crt"),
        "keyfile": str(broker / "certs" / "server.key"),
        "password_file": str(broker / "passwords"),
        "acl_file": str(TLS_CONF.with_name("acl")),
    }


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect transports, and close them at the end of the test."""
    with ExitStack() as stack:

        def connect(
            url: str,
            *patterns: Filter,
            name: str = "client",
            will: Will | None = None,
            **settings: object,
        ) -> MqttTransport:
            transport = MqttTransport(
                BrokerSettings.model_validate({"url": url, **settings}),
                client_name=name,
                will=will,
            )
            stack.callback(transport.close)
            transport.start(patterns, timeout_s=10)
            assert transport.receive(0) == LinkUp()
            return transport

        yield connect
