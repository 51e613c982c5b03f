"""What a released version sent is understood for ever; a change of the bytes raises the version."""

from __future__ import annotations

import pytest

from shared.protocol import chunking, codec
from tests.support.wire_messages import MESSAGE_TYPES, plain
from tests.support.wire_samples import PAYLOADS, SAMPLES, stored

CURRENT = f"{codec.MAJOR}.{codec.MINOR}"
VERSIONS = sorted(folder.name for folder in PAYLOADS.iterdir())
STORED = [(version, name) for version in VERSIONS for name in SAMPLES]


def test_every_message_type_has_its_sample_and_every_version_its_payloads():
    assert set(SAMPLES) == {kind.__dataclass_fields__["type"].default for kind in MESSAGE_TYPES}
    assert CURRENT in VERSIONS, "run: python -m tests.support.wire_samples"
    for name in (*SAMPLES, "chunk"):
        assert stored(CURRENT, name).stat().st_size < 4096


@pytest.mark.parametrize(("version", "name"), STORED)
def test_a_stored_payload_still_decodes_to_what_was_sent(version, name):
    if not stored(version, name).exists():
        assert version != CURRENT, "a type that came later"
        return
    assert plain(codec.decode(stored(version, name).read_bytes())) == plain(SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_the_current_version_sends_what_it_sent_before(name):
    assert codec.encode(SAMPLES[name]) == stored(CURRENT, name).read_bytes(), (
        "the bytes changed: raise codec.MINOR (a new field with a default) or codec.MAJOR, "
        "then run: python -m tests.support.wire_samples"
    )


def test_a_stored_chunk_still_joins():
    joiner = chunking.Joiner(max_bytes=10**6)
    joined = joiner.add(stored("1.0", "chunk").read_bytes(), 0.0)
    assert isinstance(joined, chunking.Joined)
    assert plain(codec.decode(joined.payload)) == plain(SAMPLES["ready"])
