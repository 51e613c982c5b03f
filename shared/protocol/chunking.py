"""Cut a message's bytes into chunks that fit a packet, and join them again.

Each chunk is ``"hc" | major u8 | header length u8 | msgpack [transfer, index, total bytes,
chunk bytes, crc32 of the whole] | 0… to 64 | bytes``. It says its own place, so chunks may
come in any order and more than once. A transfer of more chunks than `WINDOW_CHUNKS` waits for
credit from its receiver: what a broker must queue stays bounded.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgpack

from shared.errors import CodecError, PacketLimitError, VersionMismatchError
from shared.protocol.codec import MAJOR
from shared.protocol.tensors import Buffer

HEADER_BYTES = 64
CHUNK_BYTES = 256 * 1024
SMALLEST_CHUNK_BYTES = 1024
WINDOW_CHUNKS = 8
REMEMBERED_TRANSFERS = 512
MAX_OPEN_TRANSFERS = 64

_PREFIX = struct.Struct("<2sBB")
_MAGIC = b"hc"


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Where one chunk belongs. ``size`` is that of every chunk but the last."""

    transfer: int
    index: int
    total: int
    size: int
    checksum: int

    @property
    def count(self) -> int:
        """Chunks of the transfer; an empty one has one."""
        return max(1, -(-self.total // self.size))


def chunk_size(max_payload_bytes: int, *, preferred: int = CHUNK_BYTES) -> int:
    """Return how many bytes of a message go into one chunk.

    Raises:
        PacketLimitError: the broker takes too little for a chunk.
    """
    size = min(preferred, max_payload_bytes - HEADER_BYTES)
    if size < SMALLEST_CHUNK_BYTES:
        raise PacketLimitError(
            f"the broker takes {max_payload_bytes} bytes a message, hsplit needs at least "
            f"{SMALLEST_CHUNK_BYTES + HEADER_BYTES}: raise its max_packet_size"
        )
    return size


def cut(payload: Buffer, *, transfer: int, size: int) -> Iterator[bytes]:
    """Yield the chunks of ``payload``, each with its header."""
    view = memoryview(payload).cast("B")
    checksum = zlib.crc32(view)
    header = ChunkHeader(transfer, 0, len(view), size, checksum)
    for index in range(header.count):
        part = view[index * size : (index + 1) * size]
        yield b"".join((_pack(transfer, index, len(view), size, checksum), part))


def _pack(*fields: int) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return (_PREFIX.pack(_MAGIC, MAJOR, len(packed)) + packed).ljust(HEADER_BYTES, b"\0")


def parse(chunk: Buffer) -> tuple[ChunkHeader, memoryview]:
    """Return a chunk's header and its bytes.

    Raises:
        VersionMismatchError: another major version.
        CodecError: no chunk of ours, or a header that contradicts itself.
    """
    view = memoryview(chunk).cast("B")
    if len(view) < HEADER_BYTES:
        raise CodecError(f"not a chunk: {len(view)} bytes")
    magic, major, length = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise CodecError("not a chunk: wrong first bytes")
    if major != MAJOR:
        raise VersionMismatchError(
            f"chunk of protocol version {major}, this side speaks {MAJOR}: upgrade the older side"
        )
    try:
        fields = msgpack.unpackb(view[_PREFIX.size : min(HEADER_BYTES, _PREFIX.size + length)])
    except (msgpack.UnpackException, ValueError) as error:
        raise CodecError("not a chunk: unreadable header") from error
    return _checked(fields, len(view) - HEADER_BYTES), view[HEADER_BYTES:]


def _checked(fields: object, length: int) -> ChunkHeader:
    if not isinstance(fields, list) or len(fields) != 5:
        raise CodecError("chunk header is not five numbers")
    if not all(type(n) is int and 0 <= n < 2**64 for n in fields):
        raise CodecError("chunk header is not five numbers")
    header = ChunkHeader(*fields)
    if header.size < min(SMALLEST_CHUNK_BYTES, max(1, header.total)):
        raise CodecError(f"chunks of {header.size} bytes are too small")
    if header.index >= header.count:
        raise CodecError(f"chunk {header.index} of {header.count}")
    if length != min(header.size, header.total - header.index * header.size):
        raise CodecError(f"chunk {header.index} has {length} bytes")
    return header


@dataclass(slots=True)
class _Incoming:
    header: ChunkHeader
    buffer: bytearray
    changed_s: float
    seen: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Joined:
    """The whole bytes of a transfer, checked."""

    payload: bytearray


@dataclass(frozen=True, slots=True)
class Grant:
    """Tell the sender that ``chunks`` of ``transfer`` are here, so that it sends on."""

    transfer: int
    chunks: int


class Joiner:
    """Joins the chunks from one sender. Bounded in bytes, in open transfers and in time.

    ``max_bytes`` bounds one transfer and all open ones together; nothing is allocated for a
    header that would break it. A transfer with no new chunk for ``idle_s`` is forgotten.
    """

    def __init__(self, *, max_bytes: int, idle_s: float = 60.0) -> None:
        """Take the bounds."""
        self._max_bytes = max_bytes
        self._idle_s = idle_s
        self._open: dict[int, _Incoming] = {}
        self._closed: OrderedDict[int, None] = OrderedDict()

    def busy(self, now_s: float, *, within_s: float) -> bool:
        """Tell whether some open transfer got a chunk in the last ``within_s`` seconds."""
        return any(now_s - t.changed_s < within_s for t in self._open.values())

    def forget_open(self) -> None:
        """Drop what is half here: the rest of it went with a connection."""
        self._open.clear()

    def add(self, chunk: Buffer, now_s: float) -> Joined | Grant | None:
        """Take one chunk; return the whole when it was the last, a grant when one is due.

        Raises:
            CodecError: see `parse`; or too large; or contradicting an earlier chunk; or a
                wrong checksum. The transfer it named is forgotten.
        """
        header, data = parse(chunk)
        if header.transfer in self._closed:
            return None
        incoming = self._open.get(header.transfer) or self._begin(header, now_s)
        if (header.total, header.size, header.checksum) != (
            incoming.header.total,
            incoming.header.size,
            incoming.header.checksum,
        ):
            self._close(header.transfer)
            raise CodecError("chunks of one transfer contradict each other")
        if header.index in incoming.seen:
            return None
        start = header.index * header.size
        incoming.buffer[start : start + len(data)] = data
        incoming.seen.add(header.index)
        incoming.changed_s = now_s
        if len(incoming.seen) == header.count:
            return self._finish(header, incoming.buffer)
        if header.count > WINDOW_CHUNKS and len(incoming.seen) % (WINDOW_CHUNKS // 2) == 0:
            return Grant(header.transfer, len(incoming.seen))
        return None

    def _begin(self, header: ChunkHeader, now_s: float) -> _Incoming:
        for number, old in list(self._open.items()):
            if now_s - old.changed_s > self._idle_s:
                del self._open[number]
        held = sum(len(t.buffer) for t in self._open.values())
        if held + header.total > self._max_bytes or len(self._open) >= MAX_OPEN_TRANSFERS:
            raise CodecError(
                f"a message of {header.total} bytes beside {held} open ones is over the "
                f"limit of {self._max_bytes}"
            )
        incoming = _Incoming(header, bytearray(header.total), now_s)
        self._open[header.transfer] = incoming
        return incoming

    def _finish(self, header: ChunkHeader, buffer: bytearray) -> Joined:
        self._close(header.transfer)
        if zlib.crc32(buffer) != header.checksum:
            raise CodecError("a message arrived damaged: wrong checksum")
        return Joined(buffer)

    def _close(self, transfer: int) -> None:
        self._open.pop(transfer, None)
        self._closed[transfer] = None
        while len(self._closed) > REMEMBERED_TRANSFERS:
            self._closed.popitem(last=False)


class Outgoing:
    """One transfer on its way out: yields what may be sent now."""

    def __init__(self, payload: Buffer, *, transfer: int, size: int) -> None:
        """Cut ``payload`` into chunks of ``size`` bytes."""
        self.transfer = transfer
        self._chunks = cut(payload, transfer=transfer, size=size)
        self._left = max(1, -(-len(memoryview(payload).cast("B")) // size))
        self._sent = 0
        self._granted = 0

    @property
    def done(self) -> bool:
        """Whether every chunk was sent."""
        return self._left == 0

    def grant(self, chunks: int) -> None:
        """Note that the receiver holds ``chunks`` chunks; an older, lower word changes nothing."""
        self._granted = max(self._granted, chunks)

    def sendable(self) -> Iterator[bytes]:
        """Yield the chunks that the window lets go now."""
        while self._left and self._sent < self._granted + WINDOW_CHUNKS:
            self._sent += 1
            self._left -= 1
            yield next(self._chunks)
