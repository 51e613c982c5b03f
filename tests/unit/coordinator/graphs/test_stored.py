"""Graphs on disk: all of them or none, whatever happened to the folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest

from coordinator.graphs import stored
from coordinator.graphs.exporting import Export
from shared.errors import ProtocolError, StorageError
from tests.support.fake_clock import FakeClock
from tests.support.graph_children import WAIT_S, contents, spec

GRAPHS = {"graph.embeddings": b"embeddings" * 9, "graph.full_attention.forward": b"forward" * 20}


def test_what_was_saved_is_found_and_read_by_its_hash(tmp_path):
    stored.save(tmp_path / "new" / "folder", GRAPHS)
    found = stored.load(tmp_path / "new" / "folder")
    assert found is not None
    assert [(piece.name, piece.size_bytes) for piece in found.pieces] == [
        ("graph.embeddings", 90),
        ("graph.full_attention.forward", 140),
    ]
    for piece, data in zip(found.pieces, GRAPHS.values(), strict=True):
        assert piece.sha256 == hashlib.sha256(data).hexdigest()
        assert found.read(piece.sha256, offset=7, length=20) == data[7:27]
        with pytest.raises(ProtocolError, match="are not in piece"):
            found.read(piece.sha256, offset=len(data), length=1)
    with pytest.raises(ProtocolError, match="no piece"):
        found.read("0" * 64, offset=0, length=1)


def test_a_folder_that_is_not_there_or_empty_has_no_graphs(tmp_path, caplog):
    assert stored.load(tmp_path / "none") is None
    assert stored.load(tmp_path) is None
    assert caplog.text == ""


class Breaks(dict):  # type: ignore[type-arg]
    """Graphs of which the last cannot be written."""

    def items(self) -> Iterator[tuple[str, bytes]]:  # type: ignore[override]
        yield from super().items()
        raise StorageError("the disk is full")


def test_a_folder_that_is_half_written_has_none(tmp_path):
    with pytest.raises(StorageError):
        stored.save(tmp_path, Breaks(GRAPHS))
    assert len(list(tmp_path.iterdir())) == 2, "all but the index"
    assert stored.load(tmp_path) is None


def test_writing_anew_that_stops_half_way_leaves_what_was_there(tmp_path):
    stored.save(tmp_path, GRAPHS)
    before = stored.load(tmp_path)
    with pytest.raises(StorageError):
        stored.save(tmp_path, Breaks({name: data + b"!" for name, data in GRAPHS.items()}))
    after = stored.load(tmp_path)
    assert before is not None
    assert after is not None
    assert after.pieces == before.pieces


DAMAGES = {
    "one byte of a graph": lambda folder: largest(folder).write_bytes(b"x" + rest(folder)),
    "a graph's end": lambda folder: largest(folder).write_bytes(rest(folder)),
    "a graph is gone": lambda folder: largest(folder).unlink(),
    "the index is none": lambda folder: (folder / stored.INDEX).write_bytes(b"\xff{"),
    "the index is of something else": lambda folder: (folder / stored.INDEX).write_text("[1]"),
    "the index leads elsewhere": lambda folder: (folder / stored.INDEX).write_text(
        json.dumps([{"name": "graph.head", "sha256": "../../secret", "size_bytes": 1}])
    ),
    "the index is a folder": lambda folder: make_folder(folder / stored.INDEX),
}


def largest(folder):
    return max(folder.glob("*.onnx"), key=lambda path: path.stat().st_size)


def rest(folder):
    return largest(folder).read_bytes()[1:]


def make_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_where_anything_is_damaged_there_are_none_and_it_is_said(tmp_path, caplog, damage):
    stored.save(tmp_path, GRAPHS)
    damage(tmp_path)
    assert stored.load(tmp_path) is None
    assert "made anew" in caplog.text


def test_a_damaged_folder_is_whole_once_it_was_written_again(tmp_path):
    stored.save(tmp_path, GRAPHS)
    largest(tmp_path).write_bytes(b"")
    stored.save(tmp_path, GRAPHS)
    assert stored.load(tmp_path) is not None


def test_two_programs_that_write_one_folder_at_once_leave_a_whole_set(tmp_path, children):
    clock = FakeClock()
    exports = [Export(spec(), tmp_path, clock) for _ in range(3)]
    assert [export.process.wait(WAIT_S) for export in exports] == [0, 0, 0]
    found = stored.load(tmp_path)
    assert found is not None
    assert {piece.name for piece in found.pieces} == set(contents(spec()))
    # Each child wrote bytes of its own: they are of one and the same.
    processes = {bytes(one.views[0]).split()[3] for one in found.contents.values()}
    assert len(processes) == 1
