"""The network between the programs and the broker: a TCP proxy for each that can be disturbed.

*cut*: connections are reset, new ones refused. *stalled*: an unplugged cable: nothing goes through,
nobody is told, and what was under way arrives when it is plugged in again (within TCP's patience,
as here). One difference: a new connection is accepted, and then nothing answers. *slow*: so many
bytes a second in each direction, for all connections together. *disordered*: see `disorder`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.slow_link import Way
from tests.testbed.chaos.disorder import Disorder, Odds

READ_BYTES = 8 * 1024
PATIENCE_S = 10.0
USUAL_BYTES_PER_S = 500_000.0
"""So that a step of a tiny model takes a while, and most faults come in the midst of messages."""


@dataclass
class Links:
    """A context manager: one thread carries all links to the broker at ``port``."""

    port: int
    seed: int
    bytes_per_s: float = USUAL_BYTES_PER_S

    def __enter__(self) -> Links:
        self.random = random.Random(self.seed)
        self.has_broker = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links")
        self._thread.start()
        self._opened: list[Link] = []
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._opened:
            self._do(link.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def open(self) -> Link:
        """Return a new link, in order."""
        link = Link(self)
        asyncio.run_coroutine_threadsafe(link.listen(), self._loop).result(PATIENCE_S)
        self._opened.append(link)
        return link

    def lose_broker(self) -> None:
        """Behave as the broker's machine does where no broker listens."""
        self._set_broker(False)

    def find_broker(self) -> None:
        """It listens again."""
        self._set_broker(True)

    def _set_broker(self, there: bool) -> None:
        self.has_broker = there
        for link in self._opened:
            self._do(link.settle)

    def _do(self, act: Callable[[], object]) -> None:
        """Act in the loop's thread; return when it is done."""

        async def acted() -> None:
            result = act()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(acted(), self._loop).result(PATIENCE_S)


class Link:
    """One program's link. `cut` to `disorder` may be called from any thread."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._is_cut = False
        self._odds = Odds()
        self._ways = _ways(links.bytes_per_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self.disordered = 0
        self.url = ""

    async def listen(self) -> None:
        """Open the port, in the loop's thread."""
        self._moving = asyncio.Event()
        self._moving.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self._port}"

    async def close(self) -> None:
        """Close all connections and the port, in the loop's thread."""
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break what is connected, and refuse whoever comes."""
        self._is_cut = True
        self._links._do(self.settle)

    def mend(self) -> None:
        """Let everything through as it comes, at the usual speed."""
        self._ways = _ways(self._links.bytes_per_s)
        self._odds = Odds()
        self._is_cut = False
        self._links._do(self._moving.set)
        self._links._do(self.settle)

    def stall(self) -> None:
        """Let nothing through, and tell nobody."""
        self._links._do(self._moving.clear)

    def slow(self, bytes_per_s: float) -> None:
        """Carry no more than this in each direction."""
        self._ways = _ways(bytes_per_s)

    def disorder(self, odds: Odds) -> None:
        """Hand packets on twice, or late."""
        self._odds = odds

    async def settle(self) -> None:
        """Refuse and break what cannot be, in the loop's thread; who is unplugged hears nothing."""
        if self._is_cut or (not self._links.has_broker and self._moving.is_set()):
            self._server.close()
            for task in self._tasks:
                task.cancel()
        elif not self._server.is_serving():
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        self._tasks.add(own)
        ends = [writer]
        try:
            there = await asyncio.open_connection("127.0.0.1", self._links.port)
            ends.append(there[1])
            up, down = (Disorder(self._links.random) for _ in range(2))
            up.opposite, down.opposite = down, up
            await asyncio.gather(
                self._carry(reader, there[1], up, 0), self._carry(there[0], writer, down, 1)
            )
        except (OSError, asyncio.CancelledError):
            pass  # one side broke off, the link was cut, or all is over
        finally:
            for end in ends:
                end.transport.abort()
            self._tasks.discard(own)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        disorder: Disorder,
        direction: int,
    ) -> None:
        while data := await reader.read(READ_BYTES):
            now_s = asyncio.get_running_loop().time()
            await asyncio.sleep(self._ways[direction].arrival_s(len(data), now_s) - now_s)
            await self._moving.wait()
            before = disorder.done
            writer.write(disorder.passed(data, self._odds))
            self.disordered += disorder.done - before
            await writer.drain()
        await self._moving.wait()
        # Whoever says goodbye first, what the other says still arrives.
        with contextlib.suppress(OSError):
            writer.write_eof()


def _ways(bytes_per_s: float) -> tuple[Way, Way]:
    return Way(bytes_per_s), Way(bytes_per_s)
