"""Waiting for what a transport should tell."""

from __future__ import annotations

import time
from typing import Protocol

import pytest

from shared.protocol.messages import DeviceId, RunId
from shared.protocol.topics import Filter, device_topic, run_topic
from shared.transport.base import Delivery, TransportEvent, Will
from shared.transport.mqtt import MqttTransport

RUN, NANO = RunId("run"), DeviceId("nano")
ACTIVATIONS = run_topic(RUN, NANO, "activations")
REQUESTS = device_topic(NANO, "requests")
STATUS = device_topic(NANO, "status")
WILL = Will(STATUS, b"online", b"offline")

DATA = Filter(ACTIVATIONS.name, lane="data")
CONTROL = Filter(REQUESTS.name)
STATUSES = Filter(device_topic(DeviceId("x"), "status").name.replace("/x/", "/+/"))


class Connect(Protocol):
    """The `connect` fixture."""

    def __call__(
        self,
        url: str,
        *patterns: Filter,
        name: str = ...,
        will: Will | None = ...,
        **settings: object,
    ) -> MqttTransport: ...


def event(transport: MqttTransport, kind: type, *, timeout_s: float = 20.0) -> TransportEvent:
    """Return the next event of this kind, passing over others."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        found = transport.receive(left)
        if isinstance(found, kind):
            return found
    pytest.fail(f"no {kind.__name__} within {timeout_s} s")


def payload(transport: MqttTransport) -> bytes:
    """Return the next payload that arrives."""
    delivery = event(transport, Delivery)
    assert isinstance(delivery, Delivery)
    return bytes(delivery.payload)


def await_payload(transport: MqttTransport, expected: bytes) -> None:
    """Pass over payloads until this one comes; QoS 1 may bring what was before it twice.

    amqtt does so when a subscription arrives between its acknowledging a retained message
    and its handing that message on.
    """
    while payload(transport) != expected:
        pass
