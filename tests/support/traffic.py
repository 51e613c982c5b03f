"""What went over a memory broker, as messages again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from shared.protocol import chunking, codec
from shared.protocol.messages import Message
from shared.protocol.topics import Address, parse

M = TypeVar("M")


@dataclass(frozen=True)
class Sent:
    """One whole message that was published: on which topic, as which bytes."""

    address: Address
    message: Message
    encoded: bytes


def message_in(payload: bytes) -> Message | None:
    """Return the message in one payload, if it is whole in one chunk."""
    header, data = chunking.parse(payload)
    return codec.decode(data) if header.count == 1 else None


def messages(traffic: Iterable[tuple[str, bytes]]) -> Iterator[Sent]:
    """Yield every message of ``traffic``; what is no message (a status) is passed over."""
    joiners: dict[str, chunking.Joiner] = {}
    for topic, payload in traffic:
        address = parse(topic)
        if address is None or address.kind == "status":
            continue
        joiner = joiners.setdefault(topic, chunking.Joiner(max_bytes=2**30))
        joined = joiner.add(payload, 0.0)
        if isinstance(joined, chunking.Joined):
            encoded = bytes(joined.payload)
            yield Sent(address, codec.decode(encoded), encoded)


def sent(traffic: Iterable[tuple[str, bytes]], kind: type[M]) -> list[M]:
    """Return all messages of one kind, in the order of their sending."""
    return [one.message for one in messages(traffic) if isinstance(one.message, kind)]
