"""A lane turns the broker's reason codes into errors that say what to check."""

from __future__ import annotations

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from shared.config import BrokerSettings
from shared.errors import BrokerRefusedError
from shared.protocol.topics import Filter, Topic
from shared.transport.base import Will
from shared.transport.inbox import Inbox
from shared.transport.lane import (
    LONGEST_PAUSE_S,
    Endpoint,
    Lane,
    LaneNotice,
    LaneReady,
    LaneRefused,
)

SETTINGS = BrokerSettings(url="mqtt://broker.example:1883", username="nano")


class Heard:
    """A lane that is not connected, and what it tells."""

    def __init__(self, will: Will | None = None) -> None:
        self.inbox: Inbox[LaneNotice] = Inbox()
        self.lane = Lane(
            "control",
            Endpoint(SETTINGS, "client", "5", None),
            filters=[Filter("allowed"), Filter("forbidden")],
            will=will,
            inbox=self.inbox,
        )

    def connack(self, name: str) -> object:
        reason = ReasonCode(PacketTypes.CONNACK, name)
        self.lane._on_connect(self.lane._client, None, None, reason, None)
        return self.inbox.take(0)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("Bad user name or password", "HSPLIT_BROKER__PASSWORD"),
        ("Not authorized", "list of users"),
        ("Banned", "list of users"),
        ("Unsupported protocol version", "broker.protocol"),
        ("Client identifier not valid", "broker's settings"),
    ],
)
def test_a_final_refusal_names_user_broker_reason_and_remedy(reason: str, advice: str):
    heard = Heard()
    notice = heard.connack(reason)
    assert isinstance(notice, LaneRefused)
    assert isinstance(notice.error, BrokerRefusedError)
    for part in ("'nano'", "mqtt://broker.example:1883", reason, advice):
        assert part in str(notice.error)
    assert notice.unsupported_protocol is (reason == "Unsupported protocol version")


@pytest.mark.parametrize("reason", ["Server unavailable", "Server busy", "Quota exceeded"])
def test_a_passing_refusal_is_waited_out(reason: str):
    assert Heard().connack(reason) is None


def test_a_refused_subscription_is_named():
    heard = Heard()
    reasons = [ReasonCode(PacketTypes.SUBACK, name) for name in ("Granted QoS 1", "Not authorized")]
    heard.lane._on_subscribe(heard.lane._client, None, 1, reasons, None)
    notice = heard.inbox.take(0)
    assert isinstance(notice, LaneRefused)
    assert "subscribe to forbidden" in str(notice.error)
    assert not heard.lane.ready


def test_granted_subscriptions_make_a_lane_ready():
    heard = Heard()
    reasons = [ReasonCode(PacketTypes.SUBACK, "Granted QoS 1")] * 2
    heard.lane._on_subscribe(heard.lane._client, None, 1, reasons, None)
    assert heard.inbox.take(0) == LaneReady(heard.lane, 1_000_000)
    assert heard.lane.ready


def test_a_lane_with_a_birth_is_ready_when_the_broker_has_it():
    heard = Heard(Will(Topic("status"), b"online", b"offline"))
    granted = [ReasonCode(PacketTypes.SUBACK, "Granted QoS 1")] * 2
    heard.lane._on_subscribe(heard.lane._client, None, 1, granted, None)
    assert heard.inbox.take(0) is None
    assert heard.lane._birth_mid is not None
    taken = ReasonCode(PacketTypes.PUBACK, "Success")
    heard.lane._on_publish(heard.lane._client, None, heard.lane._birth_mid, taken, None)
    assert heard.inbox.take(0) == LaneReady(heard.lane, 1_000_000)


def test_however_long_the_broker_was_away_a_lane_soon_tries_again(monkeypatch: pytest.MonkeyPatch):
    passed_s = [0.0]

    def sleep(seconds: float) -> None:
        passed_s[0] += seconds

    monkeypatch.setattr(paho, "time_func", lambda: passed_s[0])
    monkeypatch.setattr(paho.time, "sleep", sleep)

    def pauses_s(lane: Lane) -> list[float]:
        found = []
        for _ in range(8):
            began_s = passed_s[0]
            lane._client._reconnect_wait()
            found.append(passed_s[0] - began_s)
        return found

    lanes = [pauses_s(Heard().lane) for _ in range(20)]
    for first, second, *_, last in lanes:
        assert 0.1 < first < 1.0
        assert second == pytest.approx(2 * first)
        assert LONGEST_PAUSE_S / 2 < last <= LONGEST_PAUSE_S + 1e-6
    assert len({round(last, 3) for *_, last in lanes}) > 10, "a fleet does not come back at once"


def test_a_publish_that_the_access_list_forbids_is_an_error():
    heard = Heard()
    reason = ReasonCode(PacketTypes.PUBACK, "Not authorized")
    heard.lane._on_publish(heard.lane._client, None, 1, reason, None)
    notice = heard.inbox.take(0)
    assert isinstance(notice, LaneRefused)
    assert "may not publish" in str(notice.error)


def test_a_publish_without_a_subscriber_is_none(caplog: pytest.LogCaptureFixture):
    heard = Heard()
    reason = ReasonCode(PacketTypes.PUBACK, "No matching subscribers")
    heard.lane._on_publish(heard.lane._client, None, 1, reason, None)
    assert heard.inbox.take(0) is None
    assert caplog.text == ""
