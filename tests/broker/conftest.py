"""Brokers as fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.config import BrokerSettings
from shared.protocol.topics import Filter
from shared.transport.base import LinkUp, Will
from shared.transport.mqtt import MqttTransport
from tests.broker.events import Connect
from tests.support.brokers import Amqtt, Mosquitto


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path) as broker:
        yield broker


@pytest.fixture(params=[pytest.param("mosquitto", marks=pytest.mark.broker), "amqtt"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mosquitto | Amqtt]:
    with Mosquitto(tmp_path) if request.param == "mosquitto" else Amqtt() as running:
        yield running


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
