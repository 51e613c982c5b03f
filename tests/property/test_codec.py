"""Every message survives the wire; whatever else arrives is refused, quickly and by name."""

from __future__ import annotations

import struct
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import CodecError, VersionMismatchError
from shared.protocol import codec
from shared.protocol.messages import (
    Accepted,
    AdapterTensors,
    Call,
    Credit,
    Leave,
    Message,
    RoundStart,
    SessionId,
)
from tests.support.wire_messages import (
    MESSAGE_TYPES,
    any_message,
    of_type,
    plain,
    tensors,
)

SHARED_CORES = settings(deadline=None)
CALL = Call(session=SessionId("0" * 16), number=3)


def decoded_or_refused(payload: bytes) -> Message | None:
    try:
        message = codec.decode(payload)
    except (CodecError, VersionMismatchError) as error:
        reason = str(error)
        assert len(reason) < 1000, "a refusal must itself fit into a message"
        return None
    again = codec.decode(codec.encode(message))
    assert plain(again) == plain(message), "whatever is taken is a message like any other"
    return message


def payload_of(header: bytes, body: bytes = b"") -> bytes:
    prefix = struct.pack("<2sBBI", b"hs", codec.MAJOR, codec.MINOR, len(header))
    return (prefix + header).ljust(-(-(8 + len(header)) // 64) * 64, b"\0") + body


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_message_survives_the_wire(kind: type, data: st.DataObject):
    message = data.draw(of_type(kind))
    assert plain(codec.decode(codec.encode(message))) == plain(message)


@SHARED_CORES
@given(first=tensors(), second=tensors())
def test_tensors_start_at_multiples_of_64_and_are_not_copied(first, second):
    adapter = AdapterTensors(module="h.0.q", a=first, b=second, scaling=2.0)
    start = RoundStart(
        call=CALL, round=1, first_step=0, steps=1, evaluate=True, adapters=(adapter,)
    )
    payload = bytearray(codec.encode(start))
    found = codec.decode(payload)
    assert isinstance(found, RoundStart)
    whole = np.frombuffer(payload, np.uint8)
    for frame in (found.adapters[0].a, found.adapters[0].b):
        inside = np.frombuffer(frame.data, np.uint8)
        assert frame.nbytes == 0 or np.shares_memory(whole, inside)
        assert frame.nbytes == 0 or (inside.ctypes.data - whole.ctypes.data) % 64 == 0


@SHARED_CORES
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(payload: bytes):
    assert decoded_or_refused(payload) is None


@SHARED_CORES
@given(header=st.binary(max_size=200), body=st.binary(max_size=100))
def test_an_arbitrary_header_is_refused(header: bytes, body: bytes):
    assert decoded_or_refused(payload_of(header, body)) is None


objects = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
    | st.builds(
        lambda *place: msgpack.ExtType(1, msgpack.packb(place)),
        st.sampled_from(["float32", "uint8", "object", 7]),
        st.lists(st.integers(-1, 2**40), max_size=5),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**64 - 1),
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=10,
)


@SHARED_CORES
@given(header=objects, body=st.binary(max_size=100))
def test_a_header_of_any_other_content_is_refused(header, body):
    assert decoded_or_refused(payload_of(msgpack.packb(header), body)) is None


@SHARED_CORES
@given(message=any_message(), field=st.text(max_size=6), value=objects, data=st.data())
def test_a_field_of_any_other_content_is_refused_or_harmless(message, field, value, data):
    header = msgpack.unpackb(_header(codec.encode(message)))
    name = data.draw(st.sampled_from(sorted(header)) | st.just(field))
    decoded_or_refused(payload_of(msgpack.packb({**header, name: value})))


def _header(payload: bytes) -> bytes:
    return payload[8 : 8 + struct.unpack_from("<I", payload, 4)[0]]


@SHARED_CORES
@given(
    message=any_message(),
    changes=st.lists(
        st.tuples(
            st.sampled_from(["flip", "cut", "insert", "double", "end"]),
            st.integers(0, 2**16),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_a_damaged_message_is_refused_or_still_a_message(message, changes):
    payload = bytearray(codec.encode(message))
    for how, where, byte in changes:
        place = where % (len(payload) or 1)
        if how == "flip" and payload:
            payload[place] ^= byte
        elif how == "cut":
            del payload[place : place + 1 + byte % 9]
        elif how == "insert":
            payload.insert(place, byte)
        elif how == "double":
            payload[place:place] = payload[place : place + byte]
        else:
            del payload[max(8, len(payload) - byte) :]
    decoded_or_refused(bytes(payload))


@given(st.binary(max_size=100), st.integers(0, 255))
def test_another_major_version_is_named_as_such(rest, major):
    payload = b"hs" + bytes([major, 0]) + rest.ljust(4, b"\0")
    if major == codec.MAJOR:
        return
    with pytest.raises(VersionMismatchError, match=f"version {major}, this side speaks 1"):
        codec.decode(payload)


GIGABYTES = {
    "list": b"\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff",
    "text": b"\xdb\xff\xff\xff\xff",
    "bytes": b"\xc6\xff\xff\xff\xff",
    "extension": b"\xc9\xff\xff\xff\xff\x01",
    "lists in lists": b"\xdd\x00\x03\xff\xff" * 2000,
    "lists no longer than the header, in each other": b"\xdc\x0b\xf0" * 1020,
    "maps in lists": b"\x91\xdf\x00\x03\xff\xff\xa1a" * 400,
}


@pytest.mark.parametrize("announced", GIGABYTES.values(), ids=GIGABYTES.keys())
def test_nothing_is_allocated_for_what_a_header_only_announces(announced: bytes):
    payload = payload_of(announced)
    decoded_or_refused(payload)  # what is imported or cached on the first call is not meant
    tracemalloc.start()
    try:
        assert decoded_or_refused(payload) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_a_tensor_that_announces_more_than_came_is_refused():
    reference = msgpack.ExtType(1, msgpack.packb(("uint8", (2**39,), 0, 2**39)))
    with pytest.raises(CodecError, match="outside of the message"):
        codec.decode(payload_of(msgpack.packb({"type": "hidden", "hidden": reference})))


def test_a_header_larger_than_the_limit_is_refused_unread():
    length = codec.MAX_HEADER_BYTES + 1
    payload = struct.pack("<2sBBI", b"hs", 1, 0, length) + bytes(length)
    with pytest.raises(CodecError, match=f"header of {length} bytes"):
        codec.decode(payload)


def test_a_newer_minor_version_with_a_field_more_is_understood():
    message = Accepted(call=CALL)
    header = msgpack.unpackb(_header(codec.encode(message)))
    newer = bytearray(payload_of(msgpack.packb({**header, "mood": "sunny"})))
    newer[3] = codec.MINOR + 1
    assert codec.decode(newer) == message


def test_a_refusal_says_which_field_it_is_about_and_quotes_no_novel():
    with pytest.raises(CodecError, match=r"message refused at credit\.chunks: .*greater than"):
        codec.decode(codec.encode(Credit(transfer=1, chunks=0)))
    with pytest.raises(CodecError) as refused:
        codec.decode(payload_of(msgpack.packb({"type": "x" * 100_000})))
    assert len(str(refused.value)) <= codec.MAX_REASON_CHARACTERS


def test_what_is_no_part_of_the_protocol_cannot_be_sent():
    with pytest.raises(TypeError, match="set cannot travel"):
        codec.encode(Leave(session=SessionId("0" * 16), reason={"a", "b"}))  # type: ignore[arg-type]
