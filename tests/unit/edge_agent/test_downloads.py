"""Fetching pieces: one window over all of them, resumed, retried once, refused in words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.conversation import Conversation, Script, StaleError, Waiting, new_instance
from edge_agent.downloads import Download, Downloads, PieceRange
from edge_agent.model_cache import ModelCache
from shared.errors import ModelError, ProtocolError, StorageError
from shared.protocol.messages import Answer, DeviceId, Piece, PieceBytes, PieceRequest, RunId
from shared.protocol.tensors import pack
from shared.protocol.topics import agent_filters, coordinator_filters, run_topic
from shared.transport.link import MessageLink, Received
from shared.transport.memory import MemoryBroker, MemoryTransport
from tests.support.fake_clock import FakeClock

NANO, RUN = DeviceId("nano"), RunId("run")
CONTENTS = {"embeddings": b"e" * 100, "block.0": b"0123456789" * 5, "final_norm": b"n"}


def pieces() -> list[Piece]:
    return [
        Piece(name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        for name, data in CONTENTS.items()
    ]


BY_SHA256 = {piece.sha256: CONTENTS[piece.name] for piece in pieces()}


def served(asked: PieceRange) -> bytes:
    return BY_SHA256[asked.sha256][asked.offset : asked.offset + asked.length]


def answer(download: Download, asked: PieceRange) -> None:
    download.place(asked.sha256, asked.offset, served(asked))


@settings(deadline=None, max_examples=25)  # each piece is an fsync
@given(window=st.integers(1, 5), range_bytes=st.integers(1, 60), link=st.data())
def test_all_pieces_arrive_and_no_more_than_the_window_is_asked(
    tmp_path_factory, window, range_bytes, link
):
    cache = ModelCache(tmp_path_factory.mktemp("cache"))
    download = Download(cache, pieces(), window=window, range_bytes=range_bytes)
    asked: list[PieceRange] = []
    while not download.complete:
        asked += download.ask()
        assert 0 < len(asked) <= window
        answer(download, asked.pop(link.draw(st.integers(0, len(asked) - 1))))
    assert download.total_bytes == 151
    assert {p.name: cache.path(p).read_bytes() for p in pieces()} == CONTENTS
    cache.close()


def test_an_interrupted_download_asks_only_for_the_rest(tmp_path):
    first = Download(ModelCache(tmp_path), pieces(), window=1, range_bytes=10)
    for _ in range(13):
        answer(first, *first.ask())
    first.close()
    second = Download(ModelCache(tmp_path), pieces(), window=9, range_bytes=10)
    assert second.total_bytes == 51
    assert sum(asked.length for asked in second.ask()) == 21
    second.close()


def test_a_finished_but_unnamed_file_needs_no_question(tmp_path):
    piece = pieces()[1]
    (tmp_path / f"{piece.sha256}.0.part").write_bytes(CONTENTS["block.0"])
    cache = ModelCache(tmp_path)
    download = Download(cache, [piece])
    assert download.ask() == ()
    assert download.complete
    assert cache.path(piece).read_bytes() == CONTENTS["block.0"]


def test_a_repeated_answer_changes_nothing(tmp_path):
    download = Download(ModelCache(tmp_path), pieces()[:1], window=2, range_bytes=60)
    first, second = download.ask()
    answer(download, first)
    answer(download, first)
    answer(download, second)
    answer(download, second)
    assert download.complete


def test_a_wrong_hash_is_fetched_once_more_and_then_refused(tmp_path, caplog):
    (piece,) = pieces()[1:2]
    download = Download(ModelCache(tmp_path), [piece])
    (asked,) = download.ask()
    download.place(asked.sha256, 0, bytes(50))
    assert "once more, from the beginning" in caplog.text
    assert not download.complete
    assert download.ask() == (asked,)
    with pytest.raises(ModelError, match="do not have the SHA-256"):
        download.place(asked.sha256, 0, bytes(50))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_asked(tmp_path):
    huge = Piece(name="head", sha256="0" * 64, size_bytes=2**60)
    with pytest.raises(StorageError, match="1,152,921,504,606,846,976 bytes more are needed and"):
        Download(ModelCache(tmp_path), [huge])


class Talk:
    """A real conversation over the in-memory broker, and the coordinator's end of it."""

    def __init__(self) -> None:
        clock = FakeClock()
        broker = MemoryBroker(clock)
        self._link = MessageLink(MemoryTransport(broker, name="coordinator"), clock)
        self._link.start(coordinator_filters(RUN), timeout_s=1)
        link = MessageLink(MemoryTransport(broker, name="nano"), clock)
        link.start(agent_filters(NANO), timeout_s=1)
        self.conversation = Conversation(NANO, new_instance(), link, clock)

    def answer_one(self, **changes: object) -> None:
        while True:
            event = self._link.receive(0)
            if isinstance(event, Received) and isinstance(event.message, PieceRequest):
                break
        asked = event.message
        content = served(PieceRange(asked.sha256, asked.offset, asked.length))
        given = PieceBytes(
            call=asked.call,
            sha256=asked.sha256,
            offset=asked.offset,
            data=pack(np.frombuffer(content, np.uint8)),
        )
        self._link.send(run_topic(RUN, NANO, "weights"), replace(given, **changes))

    def wait(self, waiting: Waiting) -> tuple[int, Answer]:
        while True:
            assert self.conversation.pump(0), "no answer came"
            answered = self.conversation.take(waiting)
            if answered is not None:
                return answered


def carried_out(script: Script[Mapping[str, Path]], talk: Talk) -> Mapping[str, Path]:
    """Drive a script to its end; return what it returns."""
    try:
        waiting = next(script)
        while True:
            talk.answer_one()
            waiting = script.send(talk.wait(waiting))
    except StopIteration as returned:
        files: Mapping[str, Path] = returned.value
        return files


def test_the_script_fetches_all_and_returns_a_file_for_each_name(tmp_path):
    talk = Talk()
    downloads = Downloads(ModelCache(tmp_path), window=3, range_bytes=16)
    files = carried_out(downloads.fetch(pieces(), talk.conversation), talk)
    assert {name: path.read_bytes() for name, path in files.items()} == CONTENTS
    again = downloads.fetch(pieces(), talk.conversation)
    with pytest.raises(StopIteration) as returned:  # and asks for nothing the second time
        next(again)
    assert returned.value.value == files


def test_a_script_that_is_broken_off_leaves_what_it_has(tmp_path):
    talk = Talk()
    script = Downloads(ModelCache(tmp_path), window=1, range_bytes=60).fetch(
        pieces(), talk.conversation
    )
    waiting = next(script)
    talk.answer_one()
    script.send(talk.wait(waiting))
    with pytest.raises(StaleError):
        script.throw(StaleError("gone"))
    rest = Download(ModelCache(tmp_path), pieces()[:1])
    assert [asked.length for asked in rest.ask()] == [40]
    rest.close()


def test_bytes_of_another_piece_are_refused(tmp_path):
    talk = Talk()
    script = Downloads(ModelCache(tmp_path)).fetch(pieces()[:1], talk.conversation)
    waiting = next(script)
    talk.answer_one(sha256="1" * 64)
    with pytest.raises(ProtocolError, match="got bytes of 1111"):
        script.send(talk.wait(waiting))


def test_beyond_its_limit_the_cache_loses_what_is_not_in_use(tmp_path):
    old = ModelCache(tmp_path)
    fetched(old, pieces()[:1])
    old.close()
    cache = ModelCache(tmp_path)
    wanted = pieces()[1:]
    fetched(cache, wanted)
    Downloads(cache).prune()
    assert len(list(tmp_path.iterdir())) == 3, "without a limit nothing goes"
    Downloads(cache, cache_limit=60).prune()
    assert {path.name for path in tmp_path.iterdir()} == {piece.sha256 for piece in wanted}
    Downloads(cache, cache_limit=0).prune()
    assert cache.missing(wanted) == (), "what is in use stays, even above the limit"
    cache.close()


def fetched(cache: ModelCache, wanted: list[Piece]) -> None:
    download = Download(cache, wanted)
    while not download.complete:
        for asked in download.ask():
            answer(download, asked)
