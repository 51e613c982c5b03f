"""A TCP proxy in front of a broker that can fall silent: a cable pulled, and perhaps put back."""

from __future__ import annotations

import asyncio
import contextlib
import threading

READ_BYTES = 64 * 1024


class StalledLink:
    """A context manager: clients that connect to ``url`` reach the broker at ``port``.

    Between `unplug` and `plug` nothing passes, either way, and nobody is told: no FIN, no reset.
    What was sent meanwhile passes afterwards, as TCP's own repetition would have it.

    Threads: any may call; the bytes move on a thread of its own.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self.url = ""

    def __enter__(self) -> StalledLink:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.url = f"mqtt://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def unplug(self) -> None:
        """Let nothing pass from now on."""
        self._loop.call_soon_threadsafe(self._passing.clear)

    def plug(self) -> None:
        """Let everything pass again."""
        self._loop.call_soon_threadsafe(self._passing.set)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        self._tasks.add(own)
        try:
            await self._passing.wait()
            broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with contextlib.closing(writer), contextlib.closing(broker_writer):
                ways = [self._carry(reader, broker_writer), self._carry(broker_reader, writer)]
                carrying = [asyncio.ensure_future(way) for way in ways]
                try:
                    await asyncio.wait(carrying, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in carrying:
                        one.cancel()
                    await asyncio.gather(*carrying, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # one side broke off, or the test is over
        finally:
            writer.close()
            self._tasks.discard(own)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(READ_BYTES):
            await self._passing.wait()
            writer.write(data)
            await writer.drain()
