"""The proxy that hands packets on twice and late knows what a packet is."""

from __future__ import annotations

from random import Random

import pytest

from tests.testbed.chaos.disorder import Disorder, Framer, Odds, packet_id

NEVER, ALWAYS_TWICE, ALWAYS_LATE = Odds(), Odds(twice=1.0), Odds(late=1.0)
PING = bytes([0xC0, 0])


def publish(number: int, *, qos: int = 1, payload: bytes = b"payload") -> bytes:
    topic = b"a/b"
    body = len(topic).to_bytes(2, "big") + topic
    body += number.to_bytes(2, "big") if qos else b""
    body += b"\0" + payload  # no properties
    return bytes([0x30 | qos << 1]) + length(len(body)) + body


def length(size: int) -> bytes:
    digits = bytearray()
    while True:
        size, digit = divmod(size, 128)
        digits.append(digit | (0x80 if size else 0))
        if not size:
            return bytes(digits)


def puback(number: int) -> bytes:
    return bytes([0x40, 2]) + number.to_bytes(2, "big")


@pytest.mark.parametrize("pieces", [1, 2, 7, 1000])
@pytest.mark.parametrize("size", [0, 100, 127, 128, 20_000, 3_000_000])
def test_packets_are_found_wherever_the_stream_is_cut(size, pieces):
    sent = [publish(1, payload=bytes(size)), PING, publish(2, qos=0), puback(3)]
    stream = b"".join(sent)
    framer = Framer()
    step = max(1, len(stream) // pieces)
    found = [
        packet
        for start in range(0, len(stream), step)
        for packet in framer.packets(stream[start : start + step])
    ]
    assert found == sent


def test_nothing_is_touched_without_odds():
    stream = publish(1) + PING + publish(2, qos=0) + puback(1)
    assert Disorder(Random(0)).passed(stream, NEVER) == stream


def test_a_copy_is_marked_and_acknowledged_once():
    up, down = Disorder(Random(0)), Disorder(Random(0))
    up.opposite, down.opposite = down, up
    first = publish(7)
    passed = up.passed(first, ALWAYS_TWICE)
    assert passed == first + bytes([first[0] | 0b1000]) + first[1:]
    assert packet_id(first) == packet_id(puback(7)) == b"\0\7"
    assert down.passed(puback(7) + puback(8) + puback(7), NEVER) == puback(8) + puback(7)


def test_what_comes_late_comes_behind_the_next_packet():
    late = Disorder(Random(0))
    assert late.passed(publish(1), ALWAYS_LATE) == b""
    assert late.passed(PING, ALWAYS_LATE) == PING + publish(1)
    assert late.done == 1


def test_only_messages_are_disturbed():
    disorder = Disorder(Random(0))
    assert disorder.passed(PING + puback(1), Odds(twice=1.0, late=1.0)) == PING + puback(1)
