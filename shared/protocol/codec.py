"""Messages to bytes and back. The only user of msgpack.

::

    "hs" | major u8 | minor u8 | header length u32 | msgpack header | 0… | tensor | 0… | tensor …

The header is the message as a map; each tensor in it is an extension value that names dtype,
shape and place of the raw bytes behind the header. Every tensor starts at a multiple of 64
bytes, and decoding copies none of them.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from shared.errors import CodecError, VersionMismatchError
from shared.protocol.messages import Message
from shared.protocol.tensors import TensorFrame

MAJOR = 1
MINOR = 0
ALIGNMENT = 64
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_REFERENCE_BYTES = 128
MAX_REASON_CHARACTERS = 500
"""A refusal quotes what it refuses, and must itself fit into a message."""

_PREFIX = struct.Struct("<2sBBI")
_MAGIC = b"hs"
_TENSOR = 1
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Message)


def encode(message: Message) -> bytes:
    """Return the bytes of one message; tensors are copied once."""
    tensors: list[TensorFrame] = []
    offset = 0

    def reference(value: object) -> msgpack.ExtType:
        nonlocal offset
        if not isinstance(value, TensorFrame):
            raise TypeError(f"{type(value).__name__} cannot travel")
        place = msgpack.packb((value.dtype, value.shape, offset, value.nbytes))
        tensors.append(value)
        offset += _padded(value.nbytes)
        return msgpack.ExtType(_TENSOR, place)

    header = msgpack.packb(_plain(message), default=reference)
    parts: list[Any] = [_PREFIX.pack(_MAGIC, MAJOR, MINOR, len(header)), header]
    parts.append(bytes(-(_PREFIX.size + len(header)) % ALIGNMENT))
    for tensor in tensors:
        parts.append(tensor.data)
        parts.append(bytes(-tensor.nbytes % ALIGNMENT))
    return b"".join(parts)


def decode(payload: bytes | bytearray | memoryview) -> Message:
    """Return the message in ``payload``; its tensors are views into it.

    Raises:
        VersionMismatchError: another major version.
        CodecError: not a message of this protocol, for whatever reason.
    """
    view = memoryview(payload).cast("B")
    header, body = _split(view)
    try:
        _check_complete(header)
        plain = msgpack.unpackb(
            header, ext_hook=lambda code, data: _tensor(code, data, body), strict_map_key=True
        )
        return _ADAPTER.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"message refused at {where or 'top'}: {first['msg']}"
        raise CodecError(reason[:MAX_REASON_CHARACTERS]) from error
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"not a message: {type(error).__name__}") from error


def _split(view: memoryview) -> tuple[memoryview, memoryview]:
    if len(view) < _PREFIX.size:
        raise CodecError(f"not a message: {len(view)} bytes")
    magic, major, _, length = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise CodecError("not a message: wrong first bytes")
    if major != MAJOR:
        raise VersionMismatchError(
            f"message of protocol version {major}, this side speaks {MAJOR}: upgrade the older side"
        )
    end = _PREFIX.size + length
    if length > MAX_HEADER_BYTES or end > len(view):
        raise CodecError(f"message header of {length} bytes in {len(view)}")
    return view[_PREFIX.size : end], view[_padded(end) :]


def _check_complete(header: memoryview) -> None:
    """Raise unless all that lists and maps announce is there: msgpack allocates for it first."""
    unpacker = msgpack.Unpacker(read_size=1024, max_buffer_size=MAX_HEADER_BYTES)
    unpacker.feed(header)
    unpacker.skip()


def _tensor(code: int, data: bytes, body: memoryview) -> TensorFrame:
    if code != _TENSOR or len(data) > MAX_REFERENCE_BYTES:
        raise CodecError(f"unknown extension {code} of {len(data)} bytes")
    place = msgpack.unpackb(data)
    if not isinstance(place, list) or len(place) != 4:
        raise CodecError("malformed tensor reference")
    dtype, shape, offset, nbytes = place
    numbers = [*shape, offset, nbytes] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**40 for n in numbers) or offset + nbytes > len(body):
        raise CodecError("tensor reference outside of the message")
    return TensorFrame(str(dtype), tuple(shape), body[offset : offset + nbytes])


def _plain(value: object) -> object:
    if isinstance(value, TensorFrame):
        return value
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT
