"""What a transport is: it moves opaque bytes between topics and says when the link is up.

A transport may lose, repeat and reorder payloads; what makes up for that stands in
`shared.protocol.calls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from shared.errors import PacketLimitError
from shared.protocol.tensors import Buffer
from shared.protocol.topics import Filter, Topic


@dataclass(frozen=True, slots=True)
class Delivery:
    """One payload that arrived on one topic."""

    topic: str
    payload: Buffer


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected (again) and subscribed on every lane: what is published now can be answered."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link is lost; the transport reconnects by itself. What is published now is dropped."""

    reason: str


TransportEvent: TypeAlias = Delivery | LinkUp | LinkDown


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for us when we vanish, and what we publish when we (re)appear."""

    topic: Topic
    birth: bytes
    death: bytes


class Transport(Protocol):
    """A link to a broker. Made unconnected; `start` once, `close` once.

    `publish` may be called from any thread; everything else belongs to the owner's thread.
    """

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload that may be published: the broker's limit less the packet's header."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed to the link since the start."""

    @property
    def bytes_received(self) -> int:
        """Payload bytes that arrived since the start."""

    def start(self, filters: Sequence[Filter], *, timeout_s: float) -> None:
        """Connect, subscribe and publish the birth; return when all of that is acknowledged.

        The first event of `receive` is then `LinkUp`.

        Raises:
            BrokerUnreachableError: nobody answered within ``timeout_s``.
            BrokerRefusedError: the broker said no, to the connection or to a subscription.
            PacketLimitError: the broker's packet limit is below what a chunk needs.
        """

    def publish(self, topic: Topic, payload: Buffer) -> None:
        """Hand over one payload; it is dropped while the link is down.

        Raises:
            PacketLimitError: the payload is larger than `max_payload_bytes`.
        """

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged what was published on the data lane last.

        Returns whether it did in time.
        """

    def receive(self, timeout_s: float) -> TransportEvent | None:
        """Return the next event, waiting up to ``timeout_s`` for one; None if none came.

        `Delivery` comes only between a `LinkUp` and the next `LinkDown`.

        Raises:
            TransportError: the link failed for good (the broker now refuses us, say).
        """

    def close(self, last_word: bytes | None = None) -> None:
        """Publish the death notice, disconnect, and stop every thread. May be called twice.

        ``last_word`` is published in place of the death notice.
        """


def check_size(
    topic: Topic, size: int, transport: Transport, *, broker: str = "this broker"
) -> None:
    """Do nothing where ``size`` bytes may be published in one payload; ``broker``: its name.

    Raises:
        PacketLimitError: they are more than the transport's `max_payload_bytes`.
    """
    if size > transport.max_payload_bytes:
        raise PacketLimitError(
            f"a payload of {size} bytes for {topic.name} is larger than the "
            f"{transport.max_payload_bytes} that {broker} takes"
        )
