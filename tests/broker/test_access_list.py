"""The shipped TLS configuration and access list: each device speaks for itself alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.link_probe import connection, measure_link
from shared.clock import SystemClock
from shared.config import BrokerSettings
from shared.errors import BrokerRefusedError
from shared.protocol.messages import DeviceId, RunId
from shared.protocol.topics import (
    COORDINATOR_STATUS,
    ROOT,
    DeviceKind,
    Filter,
    RunKind,
    Topic,
    agent_filters,
    coordinator_filters,
    device_topic,
    run_topic,
)
from shared.transport.base import Delivery, LinkUp, Will
from shared.transport.mqtt import MqttTransport
from tests.broker.events import Connect
from tests.support.brokers import TLS_CONF, Mosquitto

pytestmark = pytest.mark.broker

RUN, NANO, ORIN = RunId("run"), DeviceId("nano"), DeviceId("orin")

DEVICE_WRITES: tuple[DeviceKind, ...] = ("status", "requests", "telemetry", "echo")
DEVICE_SENDS: tuple[RunKind, ...] = ("activations", "adapter")
COORDINATOR_SENDS: tuple[RunKind, ...] = ("gradients", "handback", "weights")


def written_by(device: DeviceId) -> list[Topic]:
    return [
        *(device_topic(device, kind) for kind in DEVICE_WRITES),
        *(run_topic(RUN, device, kind) for kind in DEVICE_SENDS),
    ]


def written_to(device: DeviceId) -> list[Topic]:
    return [
        device_topic(device, "commands"),
        *(run_topic(RUN, device, kind) for kind in COORDINATOR_SENDS),
    ]


@pytest.fixture
def guarded(tmp_path: Path, broker_files: dict[str, str]) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path, scheme="mqtts", conf=TLS_CONF, **broker_files) as broker:
        yield broker


@pytest.fixture(params=["5", "3.1.1"])
def credentials(request: pytest.FixtureRequest, credentials_folder: Path) -> Any:
    """Return the broker settings of a user, in both versions of MQTT."""

    def settings(user: str) -> dict[str, str]:
        own = credentials_folder / ("" if user == "coordinator" else "devices") / user
        return {
            "username": user,
            "password_file": str(own / "password"),
            "ca_file": str(own / "ca.crt"),
            "protocol": request.param,
        }

    return settings


def arriving(transport: MqttTransport, last: set[str]) -> list[str]:
    """Return the topics of what arrives, until each of ``last`` was there."""
    came: list[str] = []
    while not last <= set(came):
        event = transport.receive(10)
        assert event is not None, f"got only {came}"
        if isinstance(event, Delivery):
            came.append(event.topic)
    return came


def test_devices_and_coordinator_may_all_that_the_protocol_needs(guarded, connect, credentials):
    will = Will(device_topic(NANO, "status"), b"online", b"offline")
    coordinator = connect(guarded.url, *coordinator_filters(RUN), **credentials("coordinator"))
    nano = connect(guarded.url, *agent_filters(NANO), will=will, **credentials("nano"))
    heard = [topic for topic in written_by(NANO) if topic != device_topic(NANO, "echo")]
    for topic in heard:
        nano.publish(topic, b"x")
    arriving(coordinator, {topic.name for topic in heard})
    for topic in (COORDINATOR_STATUS, *written_to(NANO)):
        coordinator.publish(topic, b"x")
    expected = {COORDINATOR_STATUS.name, *(topic.name for topic in written_to(NANO))}
    arriving(nano, {device_topic(NANO, "status").name, *expected})
    nano.close()
    assert device_topic(NANO, "status").name in arriving(
        coordinator, {device_topic(NANO, "status").name}
    )


def test_a_device_may_measure_its_link(guarded, credentials):
    settings = BrokerSettings.model_validate({"url": guarded.url, **credentials("nano")})
    link = measure_link(
        functools.partial(connection, settings, NANO), NANO, clock=SystemClock(), timeout_s=10
    )
    assert link.round_trip_s < 1


def test_a_device_hears_nothing_that_is_not_meant_for_it(guarded, connect, credentials):
    coordinator = connect(guarded.url, **credentials("coordinator"))
    nano = connect(guarded.url, Filter(f"{ROOT}/#"), **credentials("nano"))
    every = (*written_to(ORIN), *written_by(ORIN), COORDINATOR_STATUS, *written_to(NANO))
    for topic in every:
        coordinator.publish(topic, b"x")
    # Each lane keeps its order, so nano's own, the last on both, come after all of orin's.
    allowed = {COORDINATOR_STATUS.name, *(topic.name for topic in written_to(NANO))}
    assert set(arriving(nano, allowed)) == allowed


@pytest.mark.parametrize(
    "forbidden",
    [*written_by(ORIN), *written_to(ORIN), *written_to(NANO), COORDINATOR_STATUS],
    ids=lambda topic: topic.name,
)
def test_a_device_cannot_speak_as_another_or_as_the_coordinator(
    guarded, connect: Connect, credentials, forbidden
):
    listener = connect(
        guarded.url,
        Filter(f"{ROOT}/devices/#"),
        Filter(f"{ROOT}/coordinator/#"),
        Filter(f"{ROOT}/runs/#", lane="data"),
        **credentials("coordinator"),
    )
    nano = connect(guarded.url, **credentials("nano"))
    marker = (
        device_topic(NANO, "requests")
        if forbidden.lane == "control"
        else run_topic(RUN, NANO, "activations")
    )
    nano.publish(forbidden, b"forged")
    nano.publish(marker, b"x")
    came: set[str] = set()
    while marker.name not in came:
        try:
            # mosquitto says no, or nothing; before 2.0.12 or so it drops the client instead.
            if nano.receive(0.05) == LinkUp():
                nano.publish(marker, b"x")
        except BrokerRefusedError:
            nano = connect(guarded.url, **credentials("nano"))
            nano.publish(marker, b"x")
        event = listener.receive(0.05)
        if isinstance(event, Delivery):
            came.add(event.topic)
    assert came == {marker.name}


@pytest.mark.parametrize("user", [None, "nano", "stranger"])
def test_nobody_comes_in_without_the_right_password(guarded, broker_files, user):
    more = {} if user is None else {"username": user, "password": "wrong"}
    settings = BrokerSettings(url=guarded.url, ca_file=Path(broker_files["cafile"]), **more)
    with pytest.raises(BrokerRefusedError):
        MqttTransport(settings, client_name="client").start((), timeout_s=10)
