"""One of the three connections of an `MqttTransport`: connect, subscribe, birth, and again."""

from __future__ import annotations

import functools
import logging
import random
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Literal, ParamSpec, TypeAlias

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from shared.config import BrokerSettings
from shared.errors import TransportError
from shared.protocol.tensors import Buffer
from shared.protocol.topics import Filter, Topic
from shared.transport import refusals
from shared.transport.base import Delivery, Will
from shared.transport.inbox import Inbox
from shared.transport.paho_client import PahoClient

logger = logging.getLogger(__name__)

LaneName: TypeAlias = Literal["control", "sending", "receiving"]
ProtocolName: TypeAlias = Literal["5", "3.1.1"]

PACKET_LIMIT_BYTES = 1_000_000
"""Largest packet we send: EMQX's default limit, and below paho's trouble with TLS records."""
MAX_IN_FLIGHT = 64
"""Unacknowledged messages per connection: 16 MiB of chunks, more than any window above us."""
CONNECT_TIMEOUT_S = 5.0
LONGEST_PAUSE_S = 3.0
"""Between two attempts to connect: so soon a run goes on after a broker that was long away. An
attempt in vain costs two packets, so even a large fleet is no burden on who waits for it."""

_Arguments = ParamSpec("_Arguments")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the three connections have in common; ``client_name`` is unique on the broker."""

    settings: BrokerSettings
    client_name: str
    protocol: ProtocolName
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True)
class LaneReady:
    """Connected, subscribed and born; the broker takes packets of up to ``packet_limit_bytes``."""

    lane: Lane
    packet_limit_bytes: int


@dataclass(frozen=True, slots=True)
class LaneLost:
    """The connection ended and is being made again; ``answered``: the broker had accepted it."""

    lane: Lane
    reason: str
    answered: bool


@dataclass(frozen=True, slots=True)
class LaneRefused:
    """The broker said no, for good."""

    lane: Lane
    error: TransportError
    unsupported_protocol: bool = False


@dataclass(frozen=True, slots=True)
class LaneDied:
    """The network thread ended by itself; the lane must be replaced."""

    lane: Lane
    reason: str


LaneNotice: TypeAlias = LaneReady | LaneLost | LaneRefused | LaneDied


def _never_raises(
    callback: Callable[Concatenate[Lane, _Arguments], None],
) -> Callable[Concatenate[Lane, _Arguments], None]:
    """Keep every exception out of paho's thread, which would silently end on it."""

    @functools.wraps(callback)
    def guarded(lane: Lane, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            callback(lane, *args, **kwargs)
        except Exception:
            logger.exception("%s failed on the %s connection", callback.__name__, lane.name)

    return guarded


class Lane:
    """One paho connection that keeps itself connected and subscribed.

    paho's network thread runs the ``_on_*`` callbacks, which subscribe again, set flags and
    leave notices in the inbox: no decoding and no waiting, or keepalive stops. `publish`,
    `ready` and `connect_error` may be used from any thread; the rest is the owner's.
    """

    def __init__(
        self,
        name: LaneName,
        endpoint: Endpoint,
        *,
        filters: Sequence[Filter],
        will: Will | None,
        inbox: Inbox[LaneNotice],
    ) -> None:
        """Make an unconnected lane; ``will`` on one lane only, or the death is told twice."""
        self.name = name
        self.ready = False
        """Whether a publish now reaches a broker that knows our subscriptions."""
        self._endpoint = endpoint
        self._settings = endpoint.settings
        self._filters = tuple(filters)
        self._will = will
        self._inbox = inbox
        self._answered = False
        self._refused = False
        self._closing = threading.Event()
        self._birth_mid: int | None = None
        self._packet_limit_bytes = PACKET_LIMIT_BYTES
        self._last_sent: paho.MQTTMessageInfo | None = None
        self._client = self._make_client()

    @property
    def connect_error(self) -> OSError | None:
        """Why the last attempt to reach the broker failed; None when it was reached."""
        return self._client.connect_error

    @property
    def is_kept_waiting(self) -> bool:
        """Whether the broker was asked for a connection and has said nothing yet."""
        return self._client.reached and not self._answered

    def open(self) -> None:
        """Start to connect; the inbox hears how it goes."""
        settings = self._settings
        # MQTT 5 is asked for without properties: brokers of 3.1.1 only, amqtt among them, read
        # those as the client id and then wait for bytes that never come, instead of refusing.
        clean = True if self._endpoint.protocol == "5" else paho.MQTT_CLEAN_START_FIRST_ONLY
        self._client.connect_async(
            settings.host, settings.port, keepalive=settings.keepalive_s, clean_start=clean
        )
        self._client.loop_start()

    def publish(self, topic: Topic, payload: Buffer) -> None:
        """Queue one payload with paho, copying it unless it is ``bytes``."""
        data = payload if isinstance(payload, bytes) else bytes(payload)
        info = self._client.publish(topic.name, data, topic.qos, topic.retain)
        self._last_sent = info
        if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            raise TransportError(f"publish to {topic.name}: {paho.error_string(info.rc)}")

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has what was published last; False where it did not in time."""
        sent = self._last_sent
        if sent is None or not self.ready:
            return True
        try:
            sent.wait_for_publish(timeout_s)
            return sent.is_published()
        except (ValueError, RuntimeError):
            return False  # the link broke under it: nothing more to wait for

    def disconnect(self, *, politely: bool) -> None:
        """Begin to close; a polite goodbye makes the broker forget the will."""
        self._closing.set()
        self.ready = False
        self._client.disconnect()
        if not politely:
            self._client.abort()

    def join(self) -> None:
        """Wait for the network thread to end, after `disconnect`."""
        self._client.loop_stop()

    # --- making the client -----------------------------------------------------------------

    def _make_client(self) -> PahoClient:
        endpoint, settings = self._endpoint, self._settings
        client = PahoClient(
            f"{endpoint.client_name}-{self.name}",
            protocol=(
                MQTTProtocolVersion.MQTTv5
                if endpoint.protocol == "5"
                else MQTTProtocolVersion.MQTTv311
            ),
            on_thread_end=self._on_thread_end,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages = MAX_IN_FLIGHT
        # Unbounded on purpose: the windows of the protocol above bound what is under way, and a
        # full paho queue could only drop, here where nobody can be told.
        client.max_queued_messages = 0
        # The first delay is drawn per connection and doubles up to a limit that is drawn too, so
        # a fleet does not come back at once. paho computes with them as floats whatever its
        # annotation says.
        first, longest = random.uniform(0.2, 0.6), random.uniform(0.6, 1.0) * LONGEST_PAUSE_S  # noqa: S311
        client.reconnect_delay_set(first, longest)  # type: ignore[arg-type]
        if settings.username is not None:
            client.username_pw_set(settings.username, settings.secret())
        if endpoint.tls is not None:
            client.tls_set_context(endpoint.tls)
        if self._will is not None:
            topic = self._will.topic
            client.will_set(topic.name, self._will.death, topic.qos, topic.retain)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    # --- paho's callbacks, on its network thread ---------------------------------------------

    @_never_raises
    def _on_connect(
        self,
        client: paho.Client,
        _userdata: object,
        _flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            if refusals.is_final(reason):
                self._refuse(
                    refusals.connection_refused(self._settings, reason),
                    unsupported_protocol=reason.value == refusals.UNSUPPORTED_PROTOCOL,
                )
            return
        self._answered = True
        announced = getattr(properties, "MaximumPacketSize", PACKET_LIMIT_BYTES)
        self._packet_limit_bytes = min(PACKET_LIMIT_BYTES, announced)
        self._client.limit_in_flight(getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
        if self._filters:
            client.subscribe([(one.pattern, 1) for one in self._filters])
        else:
            self._be_born()

    @_never_raises
    def _on_subscribe(
        self,
        _client: paho.Client,
        _userdata: object,
        _mid: int,
        reasons: Sequence[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        for one, reason in zip(self._filters, reasons, strict=True):
            if reason.is_failure:
                self._refuse(
                    refusals.subscription_refused(self._settings, reason, pattern=one.pattern)
                )
                return
        self._be_born()

    @_never_raises
    def _on_publish(
        self,
        _client: paho.Client,
        _userdata: object,
        mid: int,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.value == refusals.NOT_AUTHORIZED:
            self._refuse(refusals.publish_refused(self._settings, reason))
        elif reason.is_failure:
            logger.warning("the broker dropped a message of ours: %s", reason.getName())
        elif mid == self._birth_mid:
            self._birth_mid = None
            self._be_ready()

    @_never_raises
    def _on_message(
        self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage
    ) -> None:
        # amqtt hands every client that connects what is retained for the others' subscriptions.
        if any(paho.topic_matches_sub(one.pattern, message.topic) for one in self._filters):
            self._inbox.offer(Delivery(message.topic, message.payload))

    @_never_raises
    def _on_connect_fail(self, _client: paho.Client, _userdata: object) -> None:
        error = self._client.connect_error
        if isinstance(error, ssl.SSLError) and self._refused_by_tls(error):
            return
        if isinstance(error, ssl.SSLError | ConnectionResetError):
            self._inbox.push(LaneLost(self, f"no TLS connection: {error}", answered=False))
        logger.debug("%s connection: broker not reached: %s", self.name, error)

    @_never_raises
    def _on_disconnect(
        self,
        _client: paho.Client,
        _userdata: object,
        _flags: paho.DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        answered, self._answered, self.ready = self._answered, False, False
        if self._closing.is_set() or self._refused or self._refused_by_tls(self._client.tls_error):
            return
        self._inbox.push(LaneLost(self, reason.getName(), answered))

    def _on_thread_end(self, failure: BaseException | None) -> None:
        self.ready = False
        if not self._closing.is_set() and not self._refused:
            self._inbox.push(LaneDied(self, repr(failure)))

    # --- steps --------------------------------------------------------------------------------

    def _be_born(self) -> None:
        """Publish the birth where there is one; ready when the broker has acknowledged it."""
        if self._will is None:
            self._be_ready()
            return
        topic = self._will.topic
        info = self._client.publish(topic.name, self._will.birth, topic.qos, topic.retain)
        self._birth_mid = info.mid

    def _be_ready(self) -> None:
        self.ready = True
        self._inbox.push(LaneReady(self, self._packet_limit_bytes))

    def _refused_by_tls(self, error: ssl.SSLError | None) -> bool:
        """Take in why TLS failed; tell whether that is for good."""
        refusal = refusals.tls_refused(self._settings, error)
        if refusal is not None:
            self._refuse(refusal)
        return refusal is not None

    def _refuse(self, error: TransportError, *, unsupported_protocol: bool = False) -> None:
        """Tell the owner once, and stop trying."""
        if not self._refused:
            self._refused = True
            self._inbox.push(LaneRefused(self, error, unsupported_protocol))
        self.ready = False
        self._client.disconnect()
