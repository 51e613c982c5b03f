"""What a link carries, measured through real brokers and a proxy whose rates are known."""

from __future__ import annotations

import functools

import pytest

from edge_agent.link_probe import connection, measure_link
from shared.clock import SystemClock
from shared.config import BrokerSettings
from shared.errors import BrokerRefusedError, BrokerUnreachableError
from shared.protocol.messages import DeviceId
from shared.protocol.profile import LinkMeasurement
from shared.protocol.topics import device_topic, echo_filters
from tests.broker.events import Connect, payload
from tests.support.brokers import Amqtt, Mosquitto, free_port
from tests.support.slow_link import SlowLink

NANO = DeviceId("nano")
MB = 1e6


def measured(url: str, *, timeout_s: float = 10.0, **settings: object) -> LinkMeasurement:
    broker = BrokerSettings.model_validate({"url": url, **settings})
    connect = functools.partial(connection, broker, NANO)
    return measure_link(connect, NANO, clock=SystemClock(), timeout_s=timeout_s)


def test_every_kind_of_broker_gives_a_measurement(broker: Mosquitto | Amqtt) -> None:
    link = measured(broker.url)
    # Nothing on this machine is slower, however busy it is; nothing may pass for faster.
    assert 1 * MB < link.uplink_bytes_per_s <= 1000 * MB
    assert 1 * MB < link.downlink_bytes_per_s <= 1000 * MB
    assert 0 < link.round_trip_s < 1


@pytest.mark.broker
@pytest.mark.parametrize(("up", "down"), [(2 * MB, 8 * MB), (8 * MB, 2 * MB)])
def test_a_link_of_known_rates_is_measured_within_15_percent(
    mosquitto: Mosquitto, up: float, down: float
) -> None:
    with SlowLink(mosquitto.port, up_bytes_per_s=up, down_bytes_per_s=down, latency_s=0.01) as slow:
        link = measured(slow.url)
    assert link.uplink_bytes_per_s == pytest.approx(up, rel=0.15)
    assert link.downlink_bytes_per_s == pytest.approx(down, rel=0.15)
    assert link.round_trip_s == pytest.approx(0.02, rel=0.5)


@pytest.mark.broker
def test_nothing_of_it_stays_at_the_broker(mosquitto: Mosquitto, connect: Connect) -> None:
    measured(mosquitto.url)
    late = connect(mosquitto.url, *echo_filters(NANO))
    late.publish(device_topic(NANO, "echo"), b"last")
    assert payload(late) == b"last", "nothing was retained"


def test_a_broker_that_is_not_there_is_named() -> None:
    with pytest.raises(BrokerUnreachableError, match="no broker answers"):
        measured(f"mqtt://127.0.0.1:{free_port()}", timeout_s=0.3)


@pytest.mark.broker
def test_an_access_list_without_the_echo_topic_is_named(tmp_path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic read hsplit/v1/#\n")
    refused = pytest.raises(BrokerRefusedError, match="access list")
    with Mosquitto(tmp_path, acl_file=str(acl)) as broker, refused:
        measured(broker.url)
