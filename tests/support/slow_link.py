"""A TCP proxy in front of a broker that carries so many bytes a second each way, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass

READ_BYTES = 8 * 1024


@dataclass
class Way:
    """One direction of the link, shared by all connections: one queue, first come, first served."""

    bytes_per_s: float
    free_at_s: float = 0.0

    def arrival_s(self, size: int, now_s: float) -> float:
        """Return when ``size`` bytes that come now have left this queue."""
        self.free_at_s = max(now_s, self.free_at_s) + size / self.bytes_per_s
        return self.free_at_s


class SlowLink:
    """A context manager: clients that connect to ``url`` reach the broker at ``port`` slowly.

    ``latency_s`` comes on top, each way. The queue of each direction is as long as it must be,
    as in a home router: what is small and comes late waits behind what is large and came first.
    """

    def __init__(
        self, port: int, *, up_bytes_per_s: float, down_bytes_per_s: float, latency_s: float
    ) -> None:
        self._target = port
        self._up = Way(up_bytes_per_s)
        self._down = Way(down_bytes_per_s)
        self._latency_s = latency_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    def __enter__(self) -> SlowLink:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.url = f"mqtt://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

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
            broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with contextlib.closing(writer), contextlib.closing(broker_writer):
                # Whoever says goodbye first, what it said before still arrives.
                await asyncio.gather(
                    self._carry(reader, broker_writer, self._up),
                    self._carry(broker_reader, writer, self._down),
                )
        except (OSError, asyncio.CancelledError):
            pass  # one side broke off, or the test is over
        finally:
            self._tasks.discard(own)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        writing = asyncio.ensure_future(self._deliver(queue, writer))
        try:
            data = b"?"
            while data:
                data = await reader.read(READ_BYTES)
                due_s = way.arrival_s(len(data), self._loop.time()) + self._latency_s
                queue.put_nowait((due_s, data))
            await writing
        finally:
            writing.cancel()

    async def _deliver(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        data = b"?"
        while data:
            due_s, data = await queue.get()
            await asyncio.sleep(max(0.0, due_s - self._loop.time()))
            if data:
                writer.write(data)
            else:
                writer.close()
