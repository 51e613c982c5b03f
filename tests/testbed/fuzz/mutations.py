"""Payloads that are nearly right: real ones with bytes, values, types or lengths changed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10 * 2**30)
NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 65_535, -(2**63), *HUGE)
FLOATS = (0.0, -0.0, 0.5, -1.0, 1e-308, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", "a", "\0", "../../etc/passwd", "/", "é" * 300, "x" * 5000, "a/b", "nan", "block.0", "1e999",
    "\ud7ff", "float32", "float64", "cpu", "{{7*7}}", "null",
)  # fmt: skip
DEEP = 3000
"""More levels than Python's recursion limit."""
MOST_RANDOM_BYTES = 4096
_ANNOUNCING = (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)
"""msgpack's bin, ext, str, array and map with a length of 32 bits."""


def value(rng: random.Random) -> Any:
    """Return something that JSON and msgpack both know."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(FLOATS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return [value(rng) for _ in range(rng.randrange(3))]
    if kind == 4:
        return {rng.choice(TEXTS): value(rng) for _ in range(rng.randrange(3))}
    if kind == 5:
        return rng.choice((None, True, False))
    return rng.randrange(-(2**63), 2**64) >> rng.randrange(64)


def in_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return ``data`` with some bytes flipped, cut out, repeated, put in or made a number."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(7)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xC1, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del changed[place : place + rng.randint(1, 16)]
        elif kind == 3:
            changed[place:place] = rng.randbytes(rng.randint(1, 16))
        elif kind == 4:
            del changed[place:]
        elif kind == 5:
            changed[place:place] = changed[place : place + rng.randint(1, 64)]
        else:
            changed[place : place + 4] = struct.pack(">I", rng.choice(HUGE) & 0xFFFFFFFF)
    return bytes(changed)


def noise(rng: random.Random) -> bytes:
    """Return random bytes, often few."""
    return rng.randbytes(rng.randrange(1 << rng.randrange(1, MOST_RANDOM_BYTES.bit_length())))


def in_tree(rng: random.Random, tree: Any) -> Any:
    """Return a copy with one or two of its values changed, removed, renamed or repeated."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 2)):
        places = list(_places(changed))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        _change(rng, holder, key)
    return changed


def _places(tree: Any) -> Any:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    kind = rng.randrange(6)
    old = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    elif kind == 2 and isinstance(old, list):
        holder[key] = old * rng.choice((2, 50))
    elif kind == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, -old, old * 2, *NUMBERS, *FLOATS))
    elif kind == 4 and isinstance(old, str):
        cut = rng.randrange(len(old) + 1)
        holder[key] = rng.choice((old[:cut], old + rng.choice(TEXTS), old.upper()))
    else:
        holder[key] = value(rng)


# --- msgpack ----------------------------------------------------------------------------------


def in_message(rng: random.Random, payload: bytes, *, prefix: struct.Struct) -> bytes:
    """Return a message of ours with a changed header, its length and padding made right again.

    ``prefix``: magic, major, minor, header length.
    """
    *first, length = prefix.unpack_from(payload)
    header = payload[prefix.size : prefix.size + length]
    body = payload[-(-(prefix.size + length) // 64) * 64 :]
    header = _in_header(rng, header)
    start = prefix.pack(*first, len(header)) + header
    return start + bytes(-len(start) % 64) + body


def _in_header(rng: random.Random, header: bytes) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        return in_bytes(rng, header)
    if kind == 1:  # announces far more than there is
        place = rng.randrange(len(header))
        announced = bytes([rng.choice(_ANNOUNCING)]) + struct.pack(">I", rng.choice(HUGE) % 2**32)
        return header[:place] + announced + header[place + rng.randrange(3) :]
    if kind == 2:  # nested too deeply
        place = rng.randrange(len(header))
        return header[:place] + b"\x91" * rng.choice((50, 511, 1024, DEEP)) + header[place:]
    tree = msgpack.unpackb(header, ext_hook=msgpack.ExtType)
    try:
        if kind <= 4:
            tree = _in_reference(rng, tree)
        return bytes(msgpack.packb(in_tree(rng, tree)))
    except (OverflowError, ValueError, UnicodeEncodeError):  # a number that msgpack cannot hold
        return in_bytes(rng, header)


def _in_reference(rng: random.Random, tree: Any) -> Any:
    """Change the place, shape or dtype that tensors are said to have."""
    if isinstance(tree, msgpack.ExtType):
        place = msgpack.unpackb(tree.data)
        data = msgpack.packb(in_tree(rng, place)) if rng.random() < 0.7 else noise(rng)[:200]
        return msgpack.ExtType(rng.choice((1, 1, 1, 0, 5, 127)), data)
    if isinstance(tree, dict):
        return {key: _in_reference(rng, one) for key, one in tree.items()}
    return [_in_reference(rng, one) for one in tree] if isinstance(tree, list) else tree


# --- text -------------------------------------------------------------------------------------


def in_json(rng: random.Random, data: bytes) -> bytes:
    """Return JSON with a changed value, or JSON that is none."""
    kind = rng.randrange(6)
    if kind == 0:
        return in_bytes(rng, data)
    if kind == 1:
        place = rng.randrange(len(data))
        deep = rng.choice((b"[", b'{"a":')) * DEEP
        return data[:place] + deep + data[place:]
    if kind == 2:
        return data.replace(rng.choice((b"0", b"1", b"2")), b"9" * rng.choice((30, 5000)), 1)
    return json.dumps(in_tree(rng, json.loads(data))).encode()


def in_lines(rng: random.Random, data: bytes) -> bytes:
    """Return JSON lines with some of them changed."""
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = in_json(rng, lines[place])
    return rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)


def in_yaml(rng: random.Random, data: bytes) -> bytes:
    """Return YAML with a line changed, moved in or out, or with an alias, a tag or an anchor."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    odd = (
        b"a: &a [*a, *a]", b"? [1, 2]\n: 3", b"- x", b"<<: {run: {id: x}}", b"1: 2", b"null: 1",
        b"x: !!python/object/apply:os.system ['true']", b"run: !!binary x", b"at: 2001-02-30",
        b"lora: {r: 0x7fffffffffffffff}", b"rounds: {count: .inf}", b"[" * DEEP, b"\t- x",
        b"run: {id: ../../x}", b"%YAML 9.9", b"---", b"a: !!int ''", b"b: !!float ''",
        b"x: !!timestamp ''", b"y: " + b"9" * 5000, b"? !!set {a}\n: 1", b"c: 1:60:999999999",
    )  # fmt: skip
    kind = rng.randrange(5)
    if kind == 0:
        return in_bytes(rng, data)
    if kind == 1:
        lines[place] = rng.choice((b"  ", b"\t", b"- ")) + lines[place]
    elif kind == 2:
        lines.insert(place, rng.choice(odd))
    elif kind == 3:
        name, colon, _ = lines[place].partition(b":")
        new = rng.choice((*TEXTS, *map(str, NUMBERS), *map(str, FLOATS), "[1]", "{a: 1}", "!!x y"))
        lines[place] = name + colon + b" " + new.encode("utf-8", "replace")
    else:
        del lines[place : place + rng.randint(1, 3)]
    return b"\n".join(lines)


# --- safetensors ------------------------------------------------------------------------------


def in_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Return a safetensors file with a changed header; its length is mostly made right again."""
    kind = rng.randrange(5)
    if kind == 0:
        return in_bytes(rng, data)
    (length,) = struct.unpack_from("<Q", data)
    if kind == 1:
        return struct.pack("<Q", rng.choice((*HUGE, 0, 1, length + 1)) % 2**64) + data[8:]
    header = in_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def any_of(
    seeds: Sequence[bytes], mutate: Callable[[random.Random, bytes], bytes]
) -> Callable[[random.Random], bytes]:
    """Return what makes a payload: a changed seed; at times a true one, noise, or two spliced."""

    def make(rng: random.Random) -> bytes:
        kind = rng.randrange(20)
        seed = rng.choice(seeds)
        if kind == 0:
            return noise(rng)
        if kind == 1:
            other = rng.choice(seeds)
            return seed[: rng.randrange(len(seed) + 1)] + other[rng.randrange(len(other) + 1) :]
        if kind == 2:
            return seed
        if kind <= 5:
            return in_bytes(rng, seed)
        return mutate(rng, seed)

    return make
