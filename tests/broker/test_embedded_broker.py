"""The embedded broker comes up, says which it is, and never outlives its starter."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys

import pytest

from coordinator import broker_process, embedded_broker
from coordinator.embedded_broker import EmbeddedBroker
from shared.errors import BrokerUnreachableError, ConfigError, PortTakenError
from tests.broker.events import ACTIVATIONS, DATA, Connect, payload
from tests.support.brokers import SHIPPED_CONF, free_port, listens, wait_until

KINDS = [pytest.param("mosquitto", marks=pytest.mark.broker), "amqtt"]

A_STARTER = """
import sys
from coordinator.embedded_broker import EmbeddedBroker
with EmbeddedBroker(prefer=sys.argv[1]) as broker:
    print(broker.port, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_it_carries_messages_on_the_loopback_interface(kind: str, connect: Connect):
    with EmbeddedBroker(prefer=kind) as broker:
        assert broker.kind == kind
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        transport = connect(broker.url, DATA)
        transport.publish(ACTIVATIONS, b"in")
        assert payload(transport) == b"in"
        transport.close()
    assert not listens(broker.port)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_gone_when_its_starter_is_killed(kind: str):
    command = [sys.executable, "-c", A_STARTER, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        port = int(starter.stdout.readline())
        assert listens(port)
        starter.send_signal(signal.SIGKILL)
    wait_until(lambda: not listens(port), "the broker is gone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_taken_port_is_told_with_what_to_do(kind: str):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"{port}.*embedded_broker.port"):
            EmbeddedBroker(port=port, prefer=kind).start()


@pytest.mark.parametrize("kind", KINDS)
def test_the_port_that_was_asked_for_is_used_and_can_be_used_again(kind: str):
    port = free_port()
    for _ in range(2):
        with EmbeddedBroker(port=port, prefer=kind) as broker:
            assert broker.port == port


def test_a_host_that_is_not_ours_is_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        EmbeddedBroker(host="192.0.2.1", prefer="amqtt").start()


def test_last_words_of_a_broker_that_fails_are_in_the_error(monkeypatch: pytest.MonkeyPatch):
    broker = EmbeddedBroker(prefer="amqtt")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # As when another program takes the port between the check and the start.
        monkeypatch.setattr(embedded_broker, "_free_port", lambda _host, _port: port)
        with pytest.raises(BrokerUnreachableError, match="address already in use"):
            broker.start()


def test_stopping_twice_or_before_the_start_does_nothing():
    broker = EmbeddedBroker(prefer="amqtt")
    broker.stop()
    broker.start()
    assert listens(broker.port)
    broker.stop()
    broker.stop()
    assert not listens(broker.port)


def test_without_mosquitto_amqtt_is_taken_and_mosquitto_cannot_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(broker_process, "mosquitto_path", lambda: None)
    assert EmbeddedBroker().kind == "amqtt"
    with pytest.raises(ConfigError, match="not installed"):
        EmbeddedBroker(prefer="mosquitto")


def test_an_open_network_address_is_warned_of(caplog: pytest.LogCaptureFixture):
    with (
        caplog.at_level(logging.WARNING),
        EmbeddedBroker(host="0.0.0.0", prefer="amqtt") as broker,
    ):
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
    assert "without passwords" in caplog.text


def test_its_limits_are_those_of_the_shipped_configuration():
    shipped = {line for line in SHIPPED_CONF.read_text().splitlines() if line[:1].isalpha()}
    limits = set(broker_process.MOSQUITTO_LIMITS.splitlines())
    assert limits == shipped - {"listener 1883", "allow_anonymous true"}
