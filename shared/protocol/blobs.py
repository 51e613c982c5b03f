"""How one piece of the model is pulled over a lossy link, byte range by byte range.

The receiver asks, so asking is the flow control: at most a window of ranges is asked for and
not yet here. What arrives early waits in memory (a window's worth at most) and is handed on in
order, so the file on disk is always a true beginning and its size is all there is to remember
after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shared.errors import ProtocolError
from shared.protocol.tensors import Buffer

DEFAULT_RANGE_BYTES = 1 << 20
DEFAULT_WINDOW = 4


@dataclass(frozen=True, slots=True)
class Range:
    """``length`` bytes from ``offset`` on."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after the range."""
        return self.offset + self.length


class RangePlan:
    """Which ranges of one piece to ask for next, and what of the answers to write.

    Lost questions and answers are repeated below (`shared.protocol.calls`); where a whole
    session is lost, a new plan begins with what was written. One thread only.
    """

    def __init__(
        self, size_bytes: int, *, have: int = 0, range_bytes: int = DEFAULT_RANGE_BYTES
    ) -> None:
        """Plan the bytes from ``have``, so many are on disk, up to ``size_bytes``.

        Raises:
            ValueError: the numbers contradict each other.
        """
        if not 0 <= have <= size_bytes or range_bytes < 1:
            raise ValueError(f"{have} of {size_bytes} bytes, {range_bytes} at once: impossible")
        self._size = size_bytes
        self._written = have
        self._next = have
        self._range_bytes = range_bytes
        self._asked: dict[int, Range] = {}
        self._early: dict[int, Buffer] = {}

    @property
    def complete(self) -> bool:
        """Whether every byte was handed on."""
        return self._written == self._size

    @property
    def written_bytes(self) -> int:
        """How many bytes from the beginning were handed on, those already there included."""
        return self._written

    @property
    def outstanding(self) -> int:
        """How many ranges hold a place in the window: asked for, or here and waiting."""
        return len(self._asked) + len(self._early)

    def ask(self, window: int) -> tuple[Range, ...]:
        """Return the ranges to ask for now, so that at most ``window`` are outstanding.

        They count as asked from here on.
        """
        new = []
        while self.outstanding < window and self._next < self._size:
            range_ = Range(self._next, min(self._range_bytes, self._size - self._next))
            self._asked[range_.offset] = range_
            self._next = range_.end
            new.append(range_)
        return tuple(new)

    def place(self, offset: int, data: Buffer) -> tuple[Buffer, ...]:
        """Take an answer; return what may now be appended to the file, in order.

        An answer that is already here, or that nobody waits for any more, changes nothing.

        Raises:
            ProtocolError: the answer is longer or shorter than what was asked for.
        """
        asked = self._asked.get(offset)
        if asked is None:
            return ()
        if memoryview(data).nbytes != asked.length:
            raise ProtocolError(
                f"asked for {asked.length} bytes from {offset} on, got {memoryview(data).nbytes}"
            )
        del self._asked[offset]
        self._early[offset] = data
        return tuple(self._in_order())

    def _in_order(self) -> Iterator[Buffer]:
        while (data := self._early.pop(self._written, None)) is not None:
            self._written += memoryview(data).nbytes
            yield data
