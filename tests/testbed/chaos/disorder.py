"""MQTT packets that come twice or late: just enough of MQTT to hand PUBLISH packets on otherwise.

A copy at QoS 1 has the DUP flag and the same packet id, as if its acknowledgement had been lost
and the sender had repeated it; the second acknowledgement is kept from the sender, who asked for
one. A broker hands both on. What is held back goes on behind the next packet, which on one
connection no broker would do, and two brokers in a row may.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

PUBLISH, PUBACK = 3, 4


@dataclass(frozen=True)
class Odds:
    """How probable it is that a PUBLISH comes twice, or behind the next packet."""

    twice: float = 0.0
    late: float = 0.0


@dataclass
class Framer:
    """Cuts a stream of bytes into packets."""

    _rest: bytearray = field(default_factory=bytearray)

    def packets(self, data: bytes) -> Iterator[bytes]:
        """Yield the packets that are complete by now."""
        self._rest += data
        while (size := _size(self._rest)) is not None and len(self._rest) >= size:
            yield bytes(self._rest[:size])
            del self._rest[:size]


@dataclass
class Disorder:
    """One direction of one connection; ``opposite`` hands on the acknowledgements of this one."""

    random: random.Random
    framer: Framer = field(default_factory=Framer)
    held: bytes = b""
    unwanted: Counter[bytes] = field(default_factory=Counter)
    opposite: Disorder | None = None
    done: int = 0

    def passed(self, data: bytes, odds: Odds) -> bytes:
        """Return what goes on now, of ``data`` and of what came before."""
        return b"".join(self._one(packet, odds) for packet in self.framer.packets(data))

    def _one(self, packet: bytes, odds: Odds) -> bytes:
        kind = packet[0] >> 4
        if kind == PUBACK and self.unwanted[packet_id(packet)]:
            self.unwanted[packet_id(packet)] -= 1
            return b""
        twice, late = (self.random.random() for _ in range(2))
        if kind == PUBLISH and twice < odds.twice:
            packet += self._copy(packet)
            self.done += 1
        held, self.held = self.held, b""
        if kind == PUBLISH and late < odds.late and not held:
            self.held = packet
            self.done += 1
            return b""
        return packet + held

    def _copy(self, packet: bytes) -> bytes:
        if not _quality(packet):
            return packet
        if self.opposite is not None:
            self.opposite.unwanted[packet_id(packet)] += 1
        return bytes([packet[0] | 0b1000]) + packet[1:]


def packet_id(packet: bytes) -> bytes:
    """Return the id of a PUBACK, or of a PUBLISH at QoS 1."""
    body = _header(packet)
    if packet[0] >> 4 == PUBLISH:
        body += 2 + int.from_bytes(packet[body : body + 2], "big")
    return packet[body : body + 2]


def _quality(packet: bytes) -> int:
    return packet[0] >> 1 & 0b11


def _header(packet: bytes | bytearray) -> int:
    """Return how long the fixed header is: its second part ends with a byte below 128."""
    return next(i for i in range(1, 5) if packet[i] < 0x80) + 1


def _size(data: bytearray) -> int | None:
    """Return the size of the first packet; None while its header is not complete."""
    remaining = 0
    for index in range(1, min(5, len(data))):
        remaining |= (data[index] & 0x7F) << 7 * (index - 1)
        if data[index] < 0x80:
            return index + 1 + remaining
    return None
