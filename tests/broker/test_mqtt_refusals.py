"""What `MqttTransport` says when a broker refuses, limits, stays away or makes no sense."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shared.config import BrokerSettings
from shared.errors import (
    BrokerRefusedError,
    BrokerUnreachableError,
    ConfigError,
    PacketLimitError,
    TransportError,
)
from shared.protocol.topics import Filter
from shared.transport.base import LinkDown, LinkUp
from shared.transport.mqtt import CLOSED_OFTEN, HEADER_BYTES, MqttTransport
from tests.broker.events import ACTIVATIONS, DATA, WILL, Connect, event, payload
from tests.support.brokers import (
    Amqtt,
    Mosquitto,
    free_port,
    listens,
    require_program,
    wait_until,
    write_passwords,
)


def error_of_start(
    url: str, *filters: Filter, timeout_s: float = 10.0, **settings: object
) -> TransportError | ConfigError:
    transport = MqttTransport(
        BrokerSettings.model_validate({"url": url, **settings}), client_name="client"
    )
    with pytest.raises((TransportError, ConfigError)) as caught:
        transport.start(filters, timeout_s=timeout_s)
    return caught.value


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Mosquitto]:
    """A mosquitto that knows one user: nano, with the password `right`."""
    passwords = write_passwords(tmp_path, nano="right")
    with Mosquitto(tmp_path, allow_anonymous="false", password_file=str(passwords)) as broker:
        yield broker


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_wrong_password_is_refused_with_user_broker_and_what_to_check(
    guarded: Mosquitto, protocol: str
) -> None:
    error = error_of_start(guarded.url, username="nano", password="wrong", protocol=protocol)
    assert isinstance(error, BrokerRefusedError)
    for word in ("'nano'", guarded.url, "HSPLIT_BROKER__PASSWORD", "password_file"):
        assert word in str(error)
    assert "anonymous" in str(error_of_start(guarded.url, protocol=protocol))


@pytest.mark.broker
def test_the_right_password_is_read_from_a_file(
    guarded: Mosquitto, connect: Connect, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("right\n")
    transport = connect(guarded.url, DATA, username="nano", password_file=secret, will=WILL)
    transport.publish(ACTIVATIONS, b"in")
    assert payload(transport) == b"in"


@pytest.mark.broker
def test_a_user_who_is_struck_off_hears_it_from_receive(
    guarded: Mosquitto, connect: Connect, tmp_path: Path
) -> None:
    transport = connect(guarded.url, username="nano", password="right")
    guarded.kill()
    write_passwords(tmp_path, other="right")
    guarded.start()
    assert isinstance(event(transport, LinkDown), LinkDown)
    with pytest.raises(BrokerRefusedError, match="'nano'"):
        event(transport, LinkUp)


@pytest.mark.broker
def test_the_announced_packet_limit_is_kept(tmp_path: Path, connect: Connect) -> None:
    with Mosquitto(tmp_path, max_packet_size="100000") as broker:
        transport = connect(broker.url, DATA)
        assert transport.max_payload_bytes == 100_000 - HEADER_BYTES
        transport.publish(ACTIVATIONS, bytes(transport.max_payload_bytes))
        assert len(payload(transport)) == transport.max_payload_bytes
        with pytest.raises(PacketLimitError):
            transport.publish(ACTIVATIONS, bytes(100_000))


@pytest.mark.broker
def test_a_packet_limit_too_small_for_chunks_stops_the_start(tmp_path: Path) -> None:
    with Mosquitto(tmp_path, max_packet_size="10000") as broker:
        error = error_of_start(broker.url)
    assert isinstance(error, PacketLimitError)
    assert "10000" in str(error)
    assert "max_packet_size" in str(error)


@pytest.mark.broker
def test_a_smaller_receive_maximum_is_obeyed(tmp_path: Path, connect: Connect) -> None:
    with Mosquitto(tmp_path, max_inflight_messages="3") as broker:
        transport = connect(broker.url, DATA)
        assert transport._lanes["sending"]._client.max_inflight_messages == 3
        for number in range(20):
            transport.publish(ACTIVATIONS, bytes([number]))
        assert [payload(transport)[0] for _ in range(20)] == list(range(20))


def test_nobody_at_the_address_is_told_with_the_address() -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    error = error_of_start(url, timeout_s=0.5)
    assert isinstance(error, BrokerUnreachableError)
    assert url in str(error)
    assert "refused" in str(error)


def test_an_unknown_host_is_told_as_such() -> None:
    error = error_of_start("mqtt://no-such-host.invalid:1883", timeout_s=0.5)
    assert isinstance(error, BrokerUnreachableError)
    assert "unknown host" in str(error)


@pytest.mark.broker
def test_a_broker_that_comes_up_later_is_waited_for(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    transport = MqttTransport(BrokerSettings(url=broker.url), client_name="early")
    starter = threading.Thread(target=transport.start, args=((),), kwargs={"timeout_s": 20})
    starter.start()
    try:
        wait_until(lambda: _was_refused(transport), "a first attempt failed")
        with broker:
            starter.join(20)
            assert transport.receive(0) == LinkUp()
            transport.close()
    finally:
        starter.join()


def _was_refused(transport: MqttTransport) -> bool:
    return any(lane.connect_error is not None for lane in transport._current)


class Slammer:
    """A context manager: a port that takes every connection and closes it, ``count`` of them."""

    def __init__(self, port: int = 0) -> None:
        self._server = socket.create_server(("127.0.0.1", port))
        self.port = self._server.getsockname()[1]
        self.count = 0
        self._thread = threading.Thread(target=self._slam)

    def __enter__(self) -> Slammer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()

    def _slam(self) -> None:
        while True:
            try:
                self._server.accept()[0].close()
            except OSError:
                return
            self.count += 1


@pytest.mark.broker
def test_a_proxy_whose_broker_is_down_is_waited_for_as_long_as_a_broker(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    transport = MqttTransport(BrokerSettings(url=broker.url), client_name="early")
    starter = threading.Thread(target=transport.start, args=((),), kwargs={"timeout_s": 60})
    with Slammer(broker.port) as proxy:
        starter.start()
        wait_until(lambda: proxy.count > 3 * CLOSED_OFTEN, "it was slammed often", timeout_s=30)
    with broker:
        starter.join(60)
        assert transport.receive(0) == LinkUp()
        transport.close()


def test_a_port_that_closes_every_connection_is_no_broker() -> None:
    with Slammer() as server:
        error = error_of_start(f"mqtt://127.0.0.1:{server.port}", timeout_s=5)
        assert server.count >= CLOSED_OFTEN
    assert isinstance(error, BrokerRefusedError)
    assert "closes them before answering" in str(error)


def test_a_port_that_never_answers_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"mqtt://127.0.0.1:{server.getsockname()[1]}"
        error = error_of_start(url, timeout_s=1.0)
    assert isinstance(error, BrokerUnreachableError)
    assert "got no answer" in str(error)


def test_a_broker_that_chokes_on_mqtt_5_is_asked_again_in_3_1_1(connect: Connect) -> None:
    # With a user name amqtt misreads the whole CONNECT of MQTT 5, and waits for the rest of it.
    with Amqtt() as broker:
        transport = connect(broker.url, DATA, username="nano", password="any", will=WILL)
        assert transport.protocol == "3.1.1"
        transport.publish(ACTIVATIONS, b"in")
        assert payload(transport) == b"in"


def test_a_refused_subscription_names_the_topic(tmp_path: Path) -> None:
    port = free_port()
    conf = tmp_path / "amqtt.yaml"
    plugins = {
        "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True},
        "amqtt.plugins.topic_checking.TopicTabooPlugin": {},
    }
    listeners = {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}}
    conf.write_text(yaml.safe_dump({"listeners": listeners, "plugins": plugins}))
    command = [str(Path(sys.executable).with_name("amqtt")), "-c", str(conf)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as broker:
        try:
            wait_until(lambda: listens(port), "amqtt listens")
            error = error_of_start(f"mqtt://127.0.0.1:{port}", Filter("prohibited"))
        finally:
            broker.kill()
    assert isinstance(error, BrokerRefusedError)
    assert "subscribe to prohibited" in str(error)


@pytest.mark.broker
def test_a_frozen_broker_does_not_hold_up_close(mosquitto: Mosquitto, connect: Connect) -> None:
    transport = connect(mosquitto.url, will=WILL)
    process = mosquitto._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    for _ in range(30):  # more than the sockets between can hold
        transport.publish(ACTIVATIONS, bytes(900_000))
    try:
        closing = threading.Thread(target=transport.close)
        closing.start()
        closing.join(8)
        assert not closing.is_alive()
    finally:
        os.kill(process.pid, signal.SIGCONT)


# --- TLS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server's certificate for `localhost` only, and a client's."""
    openssl = require_program("openssl")
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str, *more: str) -> None:
        subprocess.run(
            [
                *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
                *("-keyout", f"{name}.key", "-out", f"{name}.crt", *more),
            ],
            cwd=folder,
            check=True,
            capture_output=True,
        )

    make("ca", "-addext", "keyUsage=keyCertSign,cRLSign")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "basicConstraints=CA:FALSE")
    make("server", *signed, "-addext", "subjectAltName=DNS:localhost")
    make("client", *signed)
    make("stranger")
    return folder


@pytest.fixture
def with_tls(tmp_path: Path, certificates: Path) -> Iterator[Mosquitto]:
    files = {
        "cafile": certificates / "ca.crt",
        "certfile": certificates / "server.crt",
        "keyfile": certificates / "server.key",
    }
    settings = {key: str(file) for key, file in files.items()}
    with Mosquitto(tmp_path, scheme="mqtts", require_certificate="true", **settings) as broker:
        yield broker


@pytest.mark.broker
def test_tls_with_client_certificates_carries_large_payloads(
    with_tls: Mosquitto, certificates: Path, connect: Connect
) -> None:
    own = {f"{kind}_file": certificates / f"client.{end}" for kind, end in _CERTIFICATE}
    transport = connect(with_tls.url, DATA, ca_file=certificates / "ca.crt", **own)
    for _ in range(5):
        transport.publish(ACTIVATIONS, bytes(900_000))
    assert [len(payload(transport)) for _ in range(5)] == [900_000] * 5


_CERTIFICATE = (("cert", "crt"), ("key", "key"))


@pytest.mark.broker
def test_an_untrusted_certificate_is_refused(with_tls: Mosquitto, certificates: Path) -> None:
    error = error_of_start(with_tls.url, ca_file=certificates / "stranger.crt")
    assert isinstance(error, BrokerRefusedError)
    assert "broker.ca_file" in str(error)


@pytest.mark.broker
def test_a_certificate_for_another_host_is_refused(with_tls: Mosquitto, certificates: Path) -> None:
    url = with_tls.url.replace("localhost", "127.0.0.1")
    error = error_of_start(url, ca_file=certificates / "ca.crt")
    assert isinstance(error, BrokerRefusedError)
    assert "host name" in str(error)


@pytest.mark.broker
def test_a_missing_client_certificate_is_refused(with_tls: Mosquitto, certificates: Path) -> None:
    error = error_of_start(with_tls.url, ca_file=certificates / "ca.crt", timeout_s=30)
    assert isinstance(error, BrokerRefusedError)
    assert "client certificate" in str(error)


def test_a_certificate_file_that_is_none_is_a_wrong_setting(tmp_path: Path) -> None:
    rubbish = tmp_path / "ca.crt"
    rubbish.write_text("no certificate")
    error = error_of_start("mqtts://localhost:1", ca_file=rubbish)
    assert isinstance(error, ConfigError)
    assert str(rubbish) in str(error)
