"""Messages over a transport: encode, cut, wait for credit, join, decode.

Belongs to its owner's thread, but for `send_now`, which any thread may call.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shared.clock import Clock
from shared.errors import CodecError, VersionMismatchError
from shared.protocol import chunking, codec
from shared.protocol.messages import Credit, DeviceId, Message
from shared.protocol.tensors import Buffer
from shared.protocol.topics import (
    COORDINATOR_STATUS,
    Address,
    Filter,
    Topic,
    device_topic,
    parse,
)
from shared.transport.base import Delivery, LinkDown, LinkUp, Transport

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
STRANGER_BYTES = 256 * 1024
"""What a device may send before `admit`: enough to join, too little to fill the memory."""
STALLED_S = 30.0
"""A transfer that got no credit for so long is given up: chunks or credits of it were lost."""


@dataclass(frozen=True, slots=True)
class Received:
    """One whole message of, or for, one device."""

    address: Address
    message: Message


@dataclass(frozen=True, slots=True)
class StatusSeen:
    """A retained status, as its plain bytes; ``device`` None: the coordinator's."""

    device: DeviceId | None
    payload: bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Bytes on a device's topic that are no message; nothing was changed by them."""

    address: Address
    reason: str
    version_mismatch: bool


@dataclass(slots=True, eq=False)
class _Sending:
    """A transfer that waits for credit; ``moved_s``: when it last got some."""

    topic: Topic
    outgoing: chunking.Outgoing
    moved_s: float


LinkEvent: TypeAlias = Received | StatusSeen | Unreadable | LinkUp | LinkDown


class MessageLink:
    """Sends and receives `Message` objects; bytes in and out are counted per device."""

    def __init__(
        self, transport: Transport, clock: Clock, *, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        """Take an unstarted transport."""
        self._transport = transport
        self._clock = clock
        self._max_message_bytes = max_message_bytes
        self._admitted: set[DeviceId] = set()
        # A restart must not repeat the numbers of its last life, which receivers remember.
        self._transfers = itertools.count(secrets.randbits(31) << 32)
        self._outgoing: dict[DeviceId, list[_Sending]] = {}
        self._joiners: dict[DeviceId, chunking.Joiner] = {}
        self.bytes_received: Counter[DeviceId] = Counter()
        self.bytes_sent: Counter[DeviceId] = Counter()

    def start(self, filters: Sequence[Filter], *, timeout_s: float) -> None:
        """Start the transport; see `Transport.start` for the errors."""
        self._transport.start(filters, timeout_s=timeout_s)
        self._chunk_bytes = chunking.chunk_size(self._transport.max_payload_bytes)

    def close(self, last_word: bytes | None = None) -> None:
        """Close the transport; ``last_word``: what to publish in place of its death notice."""
        self._transport.close(last_word)

    def send(self, topic: Topic, message: Message) -> None:
        """Send one message; what a large one may not yet send goes out as credit arrives."""
        outgoing = self._cut(message)
        if self._publish(topic, outgoing):
            return
        address = parse(topic.name)
        assert address is not None  # only device topics carry messages
        sending = _Sending(topic, outgoing, self._clock.monotonic_s())
        self._outgoing.setdefault(address.device, []).append(sending)

    def send_now(self, topic: Topic, message: Message) -> None:
        """Send one small message at once, from any thread."""
        for chunk in self._cut(message).sendable():
            self._transport.publish(topic, chunk)

    def announce(self, topic: Topic, payload: bytes) -> None:
        """Publish a status: plain bytes, so that any MQTT tool can read it."""
        self._transport.publish(topic, payload)

    def receive(self, timeout_s: float) -> LinkEvent | None:
        """Return the next event, waiting up to ``timeout_s``; None if there was none."""
        deadline = self._clock.monotonic_s() + timeout_s
        while True:
            left = max(0.0, deadline - self._clock.monotonic_s())
            event = self._transport.receive(left)
            if event is None:
                return None
            if isinstance(event, LinkDown):
                self._outgoing.clear()
                for joiner in self._joiners.values():
                    joiner.forget_open()
            result = self._take(event) if isinstance(event, Delivery) else event
            if result is not None:
                return result

    def receiving_from(self, device: DeviceId, *, within_s: float) -> bool:
        """Tell whether a transfer from, or for, this device grew in the last ``within_s`` s."""
        joiner = self._joiners.get(device)
        return joiner is not None and joiner.busy(self._clock.monotonic_s(), within_s=within_s)

    def sending_to(self, device: DeviceId) -> bool:
        """Tell whether a transfer to (or from here as) this device still waits for credit.

        One that waits in vain is given up: credit that was lost never comes, and whoever waits
        for this transfer to end would wait forever.
        """
        now = self._clock.monotonic_s()
        waiting = self._outgoing.get(device, [])
        waiting[:] = [one for one in waiting if now - one.moved_s < STALLED_S]
        return bool(waiting)

    def admit(self, device: DeviceId) -> None:
        """Let messages of up to ``max_message_bytes`` come from, or for, this device."""
        if device not in self._admitted:
            self._admitted.add(device)
            self._joiners.pop(device, None)

    def forget(self, device: DeviceId) -> None:
        """Drop what is half sent to, or half received from, a device that is gone."""
        self._outgoing.pop(device, None)
        self._joiners.pop(device, None)

    def _cut(self, message: Message) -> chunking.Outgoing:
        payload = codec.encode(message)
        return chunking.Outgoing(payload, transfer=next(self._transfers), size=self._chunk_bytes)

    def _publish(self, topic: Topic, outgoing: chunking.Outgoing) -> bool:
        address = parse(topic.name)
        for chunk in outgoing.sendable():
            self._transport.publish(topic, chunk)
            if address is not None:
                self.bytes_sent[address.device] += len(chunk)
        return outgoing.done

    def _take(self, delivery: Delivery) -> LinkEvent | None:
        address = parse(delivery.topic)
        if address is None or address.kind == "status":
            if address is None and delivery.topic != COORDINATOR_STATUS.name:
                return None
            device = None if address is None else address.device
            return StatusSeen(device, bytes(delivery.payload[:4096]))
        self.bytes_received[address.device] += len(delivery.payload)
        try:
            message = self._join(address, delivery.payload)
        except CodecError as error:
            return Unreadable(address, str(error), version_mismatch=False)
        except VersionMismatchError as error:
            return Unreadable(address, str(error), version_mismatch=True)
        if isinstance(message, Credit):
            self._credit(address.device, message)
            return None
        return None if message is None else Received(address, message)

    def _join(self, address: Address, payload: Buffer) -> Message | None:
        joiner = self._joiners.get(address.device)
        if joiner is None:
            known = address.device in self._admitted
            limit = self._max_message_bytes if known else STRANGER_BYTES
            joiner = self._joiners[address.device] = chunking.Joiner(max_bytes=limit)
        result = joiner.add(payload, self._clock.monotonic_s())
        if isinstance(result, chunking.Grant):
            credit = Credit(transfer=result.transfer, chunks=result.chunks)
            self.send_now(_credit_topic(address), credit)
            return None
        return None if result is None else codec.decode(result.payload)

    def _credit(self, device: DeviceId, credit: Credit) -> None:
        waiting = self._outgoing.get(device, [])
        for one in list(waiting):
            if one.outgoing.transfer == credit.transfer:
                one.moved_s = self._clock.monotonic_s()
                one.outgoing.grant(credit.chunks)
                if self._publish(one.topic, one.outgoing):
                    waiting.remove(one)


def _credit_topic(received_on: Address) -> Topic:
    from_device = received_on.kind in ("activations", "adapter", "requests", "telemetry")
    return device_topic(received_on.device, "commands" if from_device else "requests")
