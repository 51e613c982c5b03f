"""Every publish and subscription that the access list forbids, tried by plain clients.

Whoever is nano, by password or by certificate, cannot speak or listen as anybody else; what
the same clients may do gets through, so that silence means a refusal.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from shared.protocol.messages import DeviceId, RunId
from shared.protocol.topics import (
    COORDINATOR_STATUS,
    ROOT,
    Filter,
    Topic,
    device_topic,
    run_topic,
)
from shared.transport.base import Delivery
from shared.transport.mqtt import MqttTransport
from tests.broker.events import Connect
from tests.support.brokers import TLS_CONF, Mosquitto, wait_until
from tests.support.plain_clients import (
    ATTACKER,
    PlainClient,
    with_certificate,
    with_password,
)

pytestmark = pytest.mark.broker

RUN, NANO, ORIN = RunId("run"), DeviceId("nano"), DeviceId("orin")

OWN_WRITES = [
    *(device_topic(NANO, kind).name for kind in ("status", "requests", "telemetry", "echo")),
    *(run_topic(RUN, NANO, kind).name for kind in ("activations", "adapter")),
]
OWN_READS = [
    COORDINATOR_STATUS.name,
    *(device_topic(NANO, kind).name for kind in ("status", "commands", "echo")),
    *(run_topic(RUN, NANO, kind).name for kind in ("gradients", "handback", "weights")),
]
EVERY = [
    COORDINATOR_STATUS.name,
    *(
        device_topic(device, kind).name
        for device in (NANO, ORIN)
        for kind in ("status", "requests", "telemetry", "commands", "echo")
    ),
    *(
        run_topic(RUN, device, kind).name
        for device in (NANO, ORIN)
        for kind in ("activations", "adapter", "gradients", "handback", "weights")
    ),
]
ELSEWHERE = [
    f"{ROOT}/devices/nano",
    f"{ROOT}/devices/nano/status/more",
    f"{ROOT}/devices/nano/new",
    f"{ROOT}/devices//status",
    f"{ROOT}/runs/run/devices/nano/new",
    f"{ROOT}/runs/a/b/devices/nano/activations",
    f"{ROOT}/coordinator/other",
    "hsplit/v2/devices/nano/status",
    "elsewhere",
]
FORBIDDEN_WRITES = [topic for topic in (*EVERY, *ELSEWHERE) if topic not in OWN_WRITES]
FORBIDDEN_READS = [topic for topic in (*EVERY, *ELSEWHERE) if topic not in OWN_READS]
SENT_TO_OTHERS = [topic for topic in FORBIDDEN_READS if topic.startswith(f"{ROOT}/")]
PATTERNS = ["#", f"{ROOT}/#", "+/+/#", f"{ROOT}/devices/+/status", f"{ROOT}/runs/+/devices/+/+"]

Plain: TypeAlias = Callable[[str], PlainClient]


@pytest.fixture(scope="module", params=["by password", "by certificate"])
def guarded(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    broker_files: dict[str, str],
) -> Iterator[tuple[Mosquitto, str]]:
    """The shipped configuration: as it is, and with both certificate lines uncommented."""
    folder = tmp_path_factory.mktemp("mosquitto")
    settings = {**broker_files, "log_type": "all"}
    if request.param == "by certificate":
        settings |= {"require_certificate": "true", "use_identity_as_username": "true"}
    with Mosquitto(folder, scheme="mqtts", conf=TLS_CONF, **settings) as broker:
        yield broker, request.param


@pytest.fixture(params=["mqttv5", "mqttv311"])
def plain(
    request: pytest.FixtureRequest, guarded: tuple[Mosquitto, str], credentials_folder: Path
) -> Plain:
    broker, kind = guarded

    def client(user: str) -> PlainClient:
        own = credentials_folder / ("" if user == "coordinator" else "devices") / user
        flags = with_password(own) if kind == "by password" else with_certificate(own)
        return PlainClient(broker, flags, request.param)

    return client


@pytest.fixture
def coordinator(
    guarded: tuple[Mosquitto, str], credentials_folder: Path, connect: Connect
) -> MqttTransport:
    """The coordinator, listening to everything there is, on one connection and so in order."""
    own = credentials_folder / "coordinator"
    return connect(
        guarded[0].url,
        Filter(f"{ROOT}/#"),
        username="coordinator",
        password_file=own / "password",
        ca_file=own / "ca.crt",
        cert_file=own / "client.crt",
        key_file=own / "client.key",
    )


def heard_until(transport: MqttTransport, payload: bytes) -> list[tuple[str, bytes]]:
    """Return all that arrives, retained things of other tests aside, before this payload."""
    heard: list[tuple[str, bytes]] = []
    while True:
        event = transport.receive(10)
        assert event is not None, f"{payload!r} did not arrive; before: {heard}"
        if isinstance(event, Delivery):
            if event.payload == payload:
                return heard
            heard.append((event.topic, bytes(event.payload)))


def heard_until_topic(transport: MqttTransport, topic: str) -> None:
    """Wait until the broker has carried what was published last, on this topic."""
    event = None
    while not isinstance(event, Delivery) or event.topic != topic:
        event = transport.receive(10)
        assert event is not None, f"nothing arrived on {topic}"


def printed(process: subprocess.Popen[str]) -> list[str]:
    """Return the topics that a subscriber heard until it ended by itself."""
    output, _ = process.communicate(timeout=20)
    return output.splitlines()


# --- speaking ---------------------------------------------------------------------------------


def test_what_a_device_may_publish_arrives(plain: Plain, coordinator: MqttTransport):
    for topic in OWN_WRITES:
        assert plain("nano").publish(topic, "allowed") == 0
    plain("nano").publish(OWN_WRITES[0], "last")
    came = {topic for topic, payload in heard_until(coordinator, b"last") if payload == b"allowed"}
    assert came == set(OWN_WRITES)


def test_nothing_that_a_device_may_not_publish_arrives(plain: Plain, coordinator: MqttTransport):
    for topic in FORBIDDEN_WRITES:
        plain("nano").publish(topic, "forged")
        plain("nano").publish(topic, "forged and kept", "-r")
    plain("nano").publish(OWN_WRITES[1], "after")
    forged = {topic for topic, text in heard_until(coordinator, b"after") if b"forged" in text}
    assert forged == set()


@pytest.mark.parametrize("topic", [COORDINATOR_STATUS.name, device_topic(ORIN, "status").name])
def test_a_will_is_no_way_around(plain: Plain, coordinator: MqttTransport, topic: str):
    broker = plain("nano").broker
    will = ("--will-topic", topic, "--will-payload", "forged", "--will-qos", "1")
    gone = broker.output().count(f"Client {ATTACKER} ")
    with plain("nano").subscribed([OWN_READS[0]], *will) as process:
        process.kill()
        process.wait()
    wait_until(lambda: broker.output().count(f"Client {ATTACKER} ") > gone, "the broker noticed")
    plain("nano").publish(OWN_WRITES[1], "after")
    assert b"forged" not in [payload for _, payload in heard_until(coordinator, b"after")]


def test_a_will_of_ones_own_is_told(plain: Plain, coordinator: MqttTransport):
    """Without this the test above could not fail."""
    will = ("--will-topic", OWN_WRITES[0], "--will-payload", "gone", "--will-qos", "1")
    with plain("nano").subscribed([OWN_READS[0]], *will) as process:
        process.kill()
        heard_until(coordinator, b"gone")


# --- listening --------------------------------------------------------------------------------


def test_a_device_hears_what_is_meant_for_it(plain: Plain, coordinator: MqttTransport):
    with plain("nano").subscribed(OWN_READS, "-R", count=len(OWN_READS)) as process:
        for topic in OWN_READS:
            coordinator.publish(Topic(topic), b"x")
        assert printed(process) == OWN_READS


@pytest.mark.parametrize(
    "subscriptions",
    [FORBIDDEN_READS, *([one] for one in PATTERNS), [f"$share/all/{ROOT}/#"]],
    ids=["each by name", *PATTERNS, "shared"],
)
def test_a_device_hears_nothing_else(
    plain: Plain, coordinator: MqttTransport, subscriptions: list[str]
):
    if subscriptions[0].startswith("$share") and plain("nano").version == "mqttv311":
        pytest.skip("shared subscriptions are of MQTT 5")
    marker = device_topic(NANO, "commands").name
    with plain("nano").subscribed([*subscriptions, f"{ROOT}/devices/nano/+"], "-R") as process:
        for topic in (*SENT_TO_OTHERS, marker):
            coordinator.publish(Topic(topic), b"x")
        assert process.stdout is not None
        heard = set()
        while marker not in heard:
            heard.add(process.stdout.readline().strip())
        assert heard == {marker}


@pytest.mark.parametrize("subscriptions", [FORBIDDEN_READS, ["#"]], ids=["each by name", "#"])
def test_a_device_gets_nothing_that_was_kept_for_others(
    plain: Plain, coordinator: MqttTransport, subscriptions: list[str]
):
    marker = device_topic(NANO, "commands").name
    kept = [Topic(topic, retain=True) for topic in (*SENT_TO_OTHERS, marker)]
    for topic in kept:
        coordinator.publish(topic, b"kept")
    heard_until_topic(coordinator, marker)
    try:
        # The broker answers subscriptions in order, so the marker's own comes after all others.
        expected = [marker] * (2 if "#" in subscriptions else 1)
        with plain("nano").subscribed([*subscriptions, marker], count=len(expected)) as process:
            assert printed(process) == expected
    finally:
        for topic in kept:
            coordinator.publish(topic, b"")  # forgets it
        heard_until_topic(coordinator, marker)
