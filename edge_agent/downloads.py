"""Fetching pieces of the base model, and graphs, from the coordinator.

`Download` decides what to ask next and writes what comes, but sends nothing; `Downloads` is
the script (`edge_agent.conversation`) that carries one out.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.conversation import Conversation, Script
from edge_agent.model_cache import ModelCache
from edge_agent.part_file import PartFile, disk_full
from shared.errors import ModelError, ProtocolError, StorageError
from shared.protocol.blobs import DEFAULT_RANGE_BYTES, DEFAULT_WINDOW, RangePlan
from shared.protocol.messages import Answer, Piece, PieceBytes, PieceRequest
from shared.protocol.tensors import Buffer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PieceRange:
    """``length`` bytes of piece ``sha256`` from ``offset`` on."""

    sha256: str
    offset: int
    length: int


@dataclass(slots=True)
class _Fetch:
    """One piece on its way."""

    piece: Piece
    part: PartFile
    plan: RangePlan


class Download:
    """Fetches the pieces that the cache lacks, one after the other, with one common window.

    One thread only. Continues unfinished files; `close` leaves them to be continued.
    """

    def __init__(
        self,
        cache: ModelCache,
        pieces: Iterable[Piece],
        *,
        window: int = DEFAULT_WINDOW,
        range_bytes: int = DEFAULT_RANGE_BYTES,
    ) -> None:
        """Find out what is missing; at most ``window`` ranges are asked for at once.

        Raises:
            StorageError: the disk has not the room.
        """
        self._cache = cache
        self._window = window
        self._range_bytes = range_bytes
        self._waiting = deque(cache.missing(pieces))
        self._open: dict[str, _Fetch] = {}
        self._failed_once: set[str] = set()
        self.total_bytes = sum(piece.size_bytes for piece in self._waiting)
        # Unfinished files count twice here: they are small beside what a device should spare.
        if self.total_bytes > shutil.disk_usage(cache.folder).free:
            raise StorageError(disk_full(cache.folder, self.total_bytes))

    @property
    def complete(self) -> bool:
        """Whether every piece is in the cache."""
        return not self._waiting and not self._open

    def ask(self) -> tuple[PieceRange, ...]:
        """Return what to ask for now; it counts as asked from here on.

        Raises:
            StorageError: the disk is full or failed.
        """
        asked: list[PieceRange] = []
        for fetch in list(self._open.values()):
            asked += self._ask(fetch)
        while self._waiting and self._free_places() > 0:
            asked += self._ask(self._begin(self._waiting.popleft()))
        return tuple(asked)

    def place(self, sha256: str, offset: int, data: Buffer) -> None:
        """Take an answer; one that nobody waits for changes nothing.

        A piece whose hash turns out wrong is fetched once more from its beginning.

        Raises:
            ProtocolError: it has another length than what was asked for.
            ModelError: the piece's hash is wrong for the second time.
            StorageError: the disk is full or failed.
        """
        fetch = self._open.get(sha256)
        if fetch is None:
            return
        for part in fetch.plan.place(offset, data):
            fetch.part.append(part)
        self._finish_if_complete(fetch)

    def close(self) -> None:
        """Let go of unfinished files, which the next `Download` continues."""
        while self._open:
            self._open.popitem()[1].part.close()

    def _free_places(self) -> int:
        return self._window - sum(fetch.plan.outstanding for fetch in self._open.values())

    def _ask(self, fetch: _Fetch) -> list[PieceRange]:
        window = self._free_places() + fetch.plan.outstanding
        return [
            PieceRange(fetch.piece.sha256, range_.offset, range_.length)
            for range_ in fetch.plan.ask(window)
        ]

    def _begin(self, piece: Piece) -> _Fetch:
        part = PartFile(self._cache.folder, piece)
        plan = RangePlan(piece.size_bytes, have=part.size_bytes, range_bytes=self._range_bytes)
        fetch = _Fetch(piece, part, plan)
        self._open[piece.sha256] = fetch
        self._finish_if_complete(fetch)
        return fetch

    def _finish_if_complete(self, fetch: _Fetch) -> None:
        if not fetch.plan.complete:
            return
        piece = fetch.piece
        del self._open[piece.sha256]
        try:
            self._cache.add(piece, fetch.part)
        except ModelError as error:
            if piece.sha256 in self._failed_once:
                raise
            logger.warning("%s (once more, from the beginning)", error)
            self._failed_once.add(piece.sha256)
            self._waiting.appendleft(piece)


class Downloads:
    """Fetches what the cache lacks, for one agent."""

    def __init__(
        self,
        cache: ModelCache,
        *,
        window: int = DEFAULT_WINDOW,
        range_bytes: int = DEFAULT_RANGE_BYTES,
        cache_limit: int | None = None,
    ) -> None:
        """Ask for at most ``window`` ranges of ``range_bytes`` at once.

        ``cache_limit``: bytes that `prune` leaves in the cache; None: all.
        """
        self._cache = cache
        self._cache_limit = cache_limit
        self._window = window
        self._range_bytes = range_bytes

    def fetch(
        self, pieces: Sequence[Piece], conversation: Conversation
    ) -> Script[Mapping[str, Path]]:
        """Return a verified file for each piece's name, after fetching those that are missing.

        Whatever ends the script leaves unfinished files, which the next one continues.

        Raises:
            ModelError: a piece's hash was wrong twice.
            ProtocolError: the coordinator answered with something else than was asked for.
            StorageError: the disk is full or failed.
        """
        download = Download(self._cache, pieces, window=self._window, range_bytes=self._range_bytes)
        try:
            yield from _carry_out(download, conversation, what=_what(pieces))
        finally:
            download.close()
        return {piece.name: self._cache.path(piece) for piece in pieces}

    def prune(self) -> None:
        """Delete what was used longest ago, down to the limit; what is in use stays.

        For when all that a plan needs was fetched, or it would delete what is wanted next.

        Raises:
            StorageError: the disk failed.
        """
        if self._cache_limit is None:
            return
        freed = self._cache.prune(self._cache_limit)
        if freed:
            logger.info("%.1f MB of older base weights deleted (cache_limit)", freed / 1e6)


def _what(pieces: Iterable[Piece]) -> str:
    are_graphs = all(piece.name.startswith("graph.") for piece in pieces)
    return "graphs" if are_graphs else "the base model"


def _carry_out(download: Download, conversation: Conversation, *, what: str) -> Script[None]:
    if download.total_bytes:
        logger.info("fetching %.1f MB of %s", download.total_bytes / 1e6, what)
    open_: dict[int, PieceRange] = {}
    while True:
        for range_ in download.ask() if conversation.has_room else ():
            open_[_post(conversation, range_)] = range_
        if not open_:
            return
        number, answer = yield frozenset(open_)
        download.place(*_content(answer, open_.pop(number)))


def _post(conversation: Conversation, range_: PieceRange) -> int:
    return conversation.post(
        lambda call: PieceRequest(
            call=call, sha256=range_.sha256, offset=range_.offset, length=range_.length
        )
    )


def _content(answer: Answer, asked: PieceRange) -> tuple[str, int, Buffer]:
    if not isinstance(answer, PieceBytes):
        raise ProtocolError(f"asked for bytes of a piece, got {type(answer).__name__}")
    if (answer.sha256, answer.offset) != (asked.sha256, asked.offset):
        raise ProtocolError(f"asked for {asked}, got bytes of {answer.sha256} at {answer.offset}")
    return answer.sha256, answer.offset, answer.data.data
