"""Chunks join again whatever the link does to them, and what is on the way stays bounded."""

from __future__ import annotations

import tracemalloc
import zlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import CodecError, PacketLimitError, VersionMismatchError
from shared.protocol import chunking
from shared.protocol.chunking import (
    HEADER_BYTES,
    SMALLEST_CHUNK_BYTES,
    WINDOW_CHUNKS,
    Grant,
    Joined,
    Joiner,
    Outgoing,
    cut,
    parse,
)

SIZE = SMALLEST_CHUNK_BYTES
SHARED_CORES = settings(deadline=None)

lengths = st.one_of(
    st.integers(0, 3 * SIZE), st.sampled_from([0, 1, SIZE - 1, SIZE, SIZE + 1, 20 * SIZE])
)


def content(length: int, seed: int = 0) -> bytes:
    return (bytes((seed + i) % 251 for i in range(251)) * (length // 251 + 1))[:length]


def joiner(max_bytes: int = 10**6) -> Joiner:
    return Joiner(max_bytes=max_bytes)


def header(*fields: object) -> bytes:
    packed = msgpack.packb(fields)
    return (b"hc\x01" + bytes([len(packed)]) + packed).ljust(HEADER_BYTES, b"\0")


@SHARED_CORES
@given(
    sizes=st.lists(lengths, min_size=1, max_size=4),
    repeats=st.lists(st.integers(0, 200), max_size=10),
    random=st.randoms(use_true_random=False),
)
def test_interleaved_transfers_join_in_any_order_with_any_repeats(sizes, repeats, random):
    payloads = {number: content(size, number) for number, size in enumerate(sizes)}
    chunks = [c for n, payload in payloads.items() for c in cut(payload, transfer=n, size=SIZE)]
    sent = chunks + [chunks[i % len(chunks)] for i in repeats]
    random.shuffle(sent)
    receiver = joiner()
    joined = [result.payload for c in sent if isinstance(result := receiver.add(c, 0.0), Joined)]
    assert sorted(map(bytes, joined)) == sorted(payloads.values()), "each once, and whole"
    assert all(receiver.add(c, 0.0) is None for c in sent), "nothing begins anew"


@SHARED_CORES
@given(length=lengths, size=st.integers(SIZE, 2 * SIZE))
def test_every_chunk_says_its_place_and_is_no_larger_than_agreed(length, size):
    payload = content(length)
    seen = bytearray(length)
    for index, chunk in enumerate(cut(payload, transfer=9, size=size)):
        place, data = parse(chunk)
        assert len(chunk) <= HEADER_BYTES + size
        assert (place.transfer, place.index, place.total) == (9, index, length)
        assert place.checksum == zlib.crc32(payload)
        seen[index * size : index * size + len(data)] = data
    assert bytes(seen) == payload
    assert place.count == index + 1


@SHARED_CORES
@given(chunk=st.binary(max_size=200), begins=st.sampled_from([b"", b"hc\x01", b"hc\x01\x10"]))
def test_arbitrary_bytes_are_refused(chunk: bytes, begins: bytes):
    receiver = joiner(4 * SIZE)
    with pytest.raises((CodecError, VersionMismatchError)):
        receiver.add(begins + chunk, 0.0)
    assert not receiver.busy(0.0, within_s=1.0)


def refused_or_consistent(chunk: bytes) -> None:
    """Check that a chunk leaves nothing behind, or is taken for what its header says it is."""
    receiver = joiner(4 * SIZE)
    try:
        taken = receiver.add(chunk, 0.0)
    except (CodecError, VersionMismatchError):
        assert not receiver.busy(0.0, within_s=1.0)
        return
    place, data = parse(chunk)
    if isinstance(taken, Joined):
        assert bytes(taken.payload) == bytes(data)
        assert (place.count, place.total, place.checksum) == (1, len(data), zlib.crc32(data))
    else:
        assert place.count > 1
        assert receiver.busy(0.0, within_s=1.0)


numbers = st.one_of(
    st.sampled_from([0, 1, SIZE, 2 * SIZE, 4 * SIZE, 2**32, 2**64 - 1]), st.integers(0, 2**64 - 1)
)
foreign = st.one_of(
    numbers,
    st.integers(-5, -1),
    st.booleans(),
    st.floats(),
    st.none(),
    st.text(max_size=3),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=3)),
)


@SHARED_CORES
@given(
    fields=st.one_of(
        st.tuples(numbers, numbers, numbers, numbers, numbers),
        st.lists(foreign, max_size=6),
    ),
    data=st.sampled_from([b"", bytes(1), bytes(SIZE), bytes(SIZE + 1)]),
)
def test_a_header_of_any_content_is_refused_or_consistent(fields, data):
    packed = msgpack.packb(list(fields))
    if len(packed) <= HEADER_BYTES - 4:
        refused_or_consistent(header(*fields) + data)


@SHARED_CORES
@given(length=lengths, place=st.integers(0, 10**6), byte=st.integers(1, 255))
def test_a_damaged_transfer_never_joins_to_something_else(length, place, byte):
    payload = content(length)
    chunks = [bytearray(c) for c in cut(payload, transfer=1, size=SIZE)]
    damaged = chunks[place % len(chunks)]
    damaged[(place // 7) % len(damaged)] ^= byte
    receiver = joiner()
    for chunk in chunks:
        try:
            result = receiver.add(chunk, 0.0)
        except (CodecError, VersionMismatchError):
            continue
        if isinstance(result, Joined):
            assert bytes(result.payload) == payload


@pytest.mark.parametrize("total", [2**30, 2**63, 2**64 - 1])
def test_nothing_is_allocated_for_a_header_that_announces_gigabytes(total):
    receiver = Joiner(max_bytes=512 * 2**20)
    chunk = header(1, 0, total, SIZE, 0) + bytes(SIZE)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="over the limit"):
            receiver.add(chunk, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000


@SHARED_CORES
@given(
    length=st.integers(1, 40 * SIZE),
    fates=st.lists(st.sampled_from(["chunk", "credit", "lose credit", "late"]), max_size=150),
)
def test_lost_credit_never_opens_the_window_and_credit_that_comes_ends_the_transfer(length, fates):
    payload = content(length)
    sender = Outgoing(payload, transfer=4, size=SIZE)
    receiver = joiner()
    on_the_way: list[bytes] = list(sender.sendable())
    granted: list[int] = []
    known = 0
    received = 0
    joined = None

    def step(fate: str) -> None:
        nonlocal received, known, joined
        if fate in ("credit", "late") and granted:
            chunks = granted.pop(0 if fate == "credit" else -1)  # credit may overtake credit
            known = max(known, chunks)
            sender.grant(chunks)
            on_the_way.extend(sender.sendable())
        elif fate == "lose credit" and len(granted) > 1:
            granted.pop()
        elif fate == "chunk" and on_the_way:
            result = receiver.add(on_the_way.pop(0), 0.0)
            received += 1
            if isinstance(result, Grant):
                granted.append(result.chunks)
            joined = result if isinstance(result, Joined) else joined
        assert len(on_the_way) <= WINDOW_CHUNKS, "more on the way than the window"
        assert received + len(on_the_way) <= known + WINDOW_CHUNKS

    for fate in fates:
        step(fate)
    while on_the_way or granted:
        step("chunk" if on_the_way else "late")
    assert sender.done
    assert joined is not None
    assert bytes(joined.payload) == payload


def test_only_a_transfer_larger_than_the_window_costs_credit():
    def granted(chunks: int) -> list[int]:
        receiver = joiner()
        results = [receiver.add(c, 0.0) for c in cut(content(chunks * SIZE), transfer=1, size=SIZE)]
        return [r.chunks for r in results if isinstance(r, Grant)]

    assert granted(WINDOW_CHUNKS) == []
    assert granted(2 * WINDOW_CHUNKS + 1) == [4, 8, 12, 16]


def test_repeats_bring_no_credit_and_do_not_keep_a_transfer_alive():
    receiver = joiner()
    chunks = list(cut(content(20 * SIZE), transfer=1, size=SIZE))
    assert [receiver.add(c, 0.0) for c in chunks[:4]] == [None, None, None, Grant(1, 4)]
    assert [receiver.add(c, 9.0) for c in chunks[:4]] == [None] * 4
    assert not receiver.busy(9.0, within_s=5.0)


def test_an_older_and_lower_word_of_credit_changes_nothing():
    sender = Outgoing(content(40 * SIZE), transfer=1, size=SIZE)
    assert len(list(sender.sendable())) == WINDOW_CHUNKS
    sender.grant(8)
    sender.grant(4)
    assert len(list(sender.sendable())) == 8
    assert not sender.done


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 0, 2 * SIZE, SIZE, 5), (1, 1, 2 * SIZE, SIZE, 6)),
        ((1, 0, 2 * SIZE, SIZE, 5), (1, 1, 3 * SIZE, SIZE, 5)),
    ],
)
def test_chunks_that_contradict_each_other_end_their_transfer(first, second):
    receiver = joiner()
    receiver.add(header(*first) + bytes(SIZE), 0.0)
    with pytest.raises(CodecError, match="contradict"):
        receiver.add(header(*second) + bytes(SIZE), 0.0)
    assert receiver.add(header(*first) + bytes(SIZE), 0.0) is None
    assert not receiver.busy(0.0, within_s=1.0)


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (b"", "0 bytes"),
        (bytes(HEADER_BYTES), "wrong first bytes"),
        (header("a", 0, 1, 1, 0) + b"x", "five numbers"),
        (header(0, 0, 1, 1) + b"x", "five numbers"),
        (header(True, 0, 1, 1, 0) + b"x", "five numbers"),
        (header(0, 0, -1, 1, 0) + b"x", "five numbers"),
        (header(0, 1, 1, 1, 0) + b"x", "chunk 1 of 1"),
        (header(0, 0, 2, 2, 0) + b"x", "has 1 bytes"),
        (header(0, 0, 10**6, 1, 0) + b"x", "too small"),
        (header(0, 0, 0, 0, 0), "too small"),
    ],
)
def test_a_chunk_that_makes_no_sense_is_refused_by_name(chunk, says):
    with pytest.raises(CodecError, match=says):
        parse(chunk)


def test_a_chunk_of_another_major_version_is_named_as_such():
    chunk = bytearray(header(0, 0, 1, 1, 0) + b"x")
    chunk[2] = 2
    with pytest.raises(VersionMismatchError, match="version 2, this side speaks 1"):
        parse(chunk)


def test_a_wrong_checksum_is_refused_once_and_the_transfer_is_over():
    receiver = joiner()
    with pytest.raises(CodecError, match="wrong checksum"):
        receiver.add(header(3, 0, 4, 4, 0) + b"data", 0.0)
    assert receiver.add(header(3, 0, 4, 4, 0) + b"data", 0.0) is None


def test_open_transfers_share_one_limit_and_a_forgotten_one_makes_room():
    receiver = Joiner(max_bytes=5 * SIZE, idle_s=60.0)
    half = next(cut(content(3 * SIZE), transfer=1, size=SIZE))
    other = next(cut(content(3 * SIZE), transfer=2, size=SIZE))
    receiver.add(half, 0.0)
    with pytest.raises(CodecError, match="beside 3072 open ones"):
        receiver.add(other, 60.0)
    receiver.add(other, 60.1)
    assert receiver.busy(60.2, within_s=1.0)


def test_not_even_empty_announcements_are_kept_without_end():
    receiver = joiner(10**9)
    for number in range(chunking.MAX_OPEN_TRANSFERS):
        receiver.add(header(number, 0, 2 * SIZE, SIZE, 0) + bytes(SIZE), 0.0)
    with pytest.raises(CodecError, match="limit"):
        receiver.add(header(99, 0, 2 * SIZE, SIZE, 0) + bytes(SIZE), 0.0)


@pytest.mark.parametrize(("takes", "size"), [(10**6, 256 * 1024), (100_064, 100_000), (1088, 1024)])
def test_a_chunk_and_its_header_fit_what_the_broker_takes(takes, size):
    assert chunking.chunk_size(takes) == size


def test_a_broker_that_takes_too_little_is_named_with_both_numbers():
    with pytest.raises(PacketLimitError, match="takes 1087 bytes a message.*at least 1088"):
        chunking.chunk_size(1087)
