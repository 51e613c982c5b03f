"""A stranger at the broker: publishes what is no message, and reads what is answered."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

import msgpack
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from shared.errors import HsplitError
from shared.protocol import chunking, codec
from shared.protocol.messages import DeviceId, Message, RunId
from shared.protocol.topics import COORDINATOR_STATUS, Topic, device_topic, run_topic
from tests.support.brokers import wait_until

T = TypeVar("T")

PAUSE_S = 0.02


class Stranger:
    """A plain MQTT client. Use it as a context manager.

    Threads: paho's network thread collects what arrives; `pester` publishes from a thread of
    its own until the end; all else belongs to the test.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_message = self._on_message
        self._arrived: list[tuple[str, bytes]] = []
        self._replies: dict[str, tuple[Topic, bytes]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._client.connect(parts.hostname or "", parts.port or 1883)
        self._client.loop_start()
        self.published = 0

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._client.disconnect()
        self._client.loop_stop()

    def listen(self, topic: Topic) -> None:
        """Collect what comes on ``topic``; returns when the broker has granted it."""
        granted = threading.Event()
        self._client.on_subscribe = lambda *_: granted.set()
        self._client.subscribe(topic.name, qos=1)
        assert granted.wait(10), "the broker does not answer"

    def publish(self, topic: Topic, payload: bytes) -> None:
        """Publish and wait until the broker has it."""
        self._client.publish(topic.name, payload, qos=1, retain=topic.retain).wait_for_publish(10)

    def wait_for(self, topic: Topic, kind: type[T]) -> T:
        """Return the first message of type ``kind`` that comes on ``topic``."""

        def found() -> list[T]:
            messages = [_message(payload) for name, payload in self._arrived if name == topic.name]
            return [message for message in messages if isinstance(message, kind)]

        wait_until(lambda: bool(found()), f"a {kind.__name__} on {topic.name}", timeout_s=30)
        return found()[0]

    def answer(self, asked: Topic, told: Topic, payload: bytes) -> None:
        """Publish ``payload`` on ``told`` whenever something comes on ``asked``."""
        self._replies[asked.name] = (told, payload)
        self.listen(asked)

    def pester(self, topics: Sequence[Topic]) -> None:
        """Publish garbage on all ``topics`` from now on."""
        self._thread = threading.Thread(target=self._pester, args=(topics,), daemon=True)
        self._thread.start()

    def _pester(self, topics: Sequence[Topic]) -> None:
        for topic, payload in zip(itertools.cycle(topics), garbage(), strict=False):
            if self._stop.wait(PAUSE_S):
                return
            # Never retained: it must not outlive the test's own order of events.
            self._client.publish(topic.name, payload, qos=1)
            self.published += 1

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        self._arrived.append((message.topic, message.payload))
        if message.topic in self._replies:
            told, payload = self._replies[message.topic]
            self._client.publish(told.name, payload, qos=1)


def _message(payload: bytes) -> Message | None:
    try:
        joined = chunking.Joiner(max_bytes=2**20).add(payload, 0.0)
        return codec.decode(joined.payload) if isinstance(joined, chunking.Joined) else None
    except HsplitError:
        return None


def device_topics(device: str, run: str) -> list[Topic]:
    """Return every topic of one device, whoever may publish on it."""
    kinds = [device_topic(DeviceId(device), k) for k in ("status", "requests", "telemetry")]
    kinds.append(device_topic(DeviceId(device), "commands"))
    data = ("activations", "adapter", "gradients", "handback", "weights")
    return [*kinds, *(run_topic(RunId(run), DeviceId(device), kind) for kind in data)]


def all_topics(devices: Sequence[str], run: str) -> list[Topic]:
    """Return every topic of these devices, and the coordinator's own."""
    return [COORDINATOR_STATUS, *(t for device in devices for t in device_topics(device, run))]


def garbage() -> Iterator[bytes]:
    """Yield, without end, what no receiver may choke on."""
    random_ = random.Random(0)
    whole = next(chunking.cut(b"hs\x01\x00" + bytes(300), transfer=7, size=2048))
    fixed = (
        b"",
        b"\0",
        b"hc",
        b"hs\x01\x00",
        b"[" * 4096,  # too deep for a JSON parser
        b'{"state": "offline"}',
        b'{"state": ["offline"], "instance": {}}',
        b"\xff" * 100,
        whole,  # a chunk of ours with no message in it
        whole[:-1],
        chunk_header([7, 0, 2**40, 2**20, 0]) + b"x" * 100,
        chunk_header([8, 0, 2**27, 2**27, 0]) + b"x" * 100,
        chunk_header([8, -1, 0.5, None, []]) + b"x",
        next(chunking.cut(codec_bomb(), transfer=9, size=4096)),
    )
    for number in itertools.count():
        yield fixed[number % len(fixed)]
        yield random_.randbytes(random_.randrange(2000))


def chunk_header(fields: object, *, major: int = codec.MAJOR) -> bytes:
    """Return the header of a chunk, which need not make sense."""
    packed: bytes = msgpack.packb(fields)
    return (b"hc" + bytes([major, len(packed)]) + packed).ljust(chunking.HEADER_BYTES, b"\0")


def of_version(major: int) -> bytes:
    """Return what a sender of another major version might send: nothing but its head is known."""
    return chunk_header([1, 0, 40, 4096, 0], major=major) + b"from the future".ljust(40)


def codec_bomb() -> bytes:
    """Return a message whose header nests deeper than any parser likes."""
    header = b"\x91" * 2000 + b"\xc0"
    return b"hs" + bytes([codec.MAJOR, 0]) + len(header).to_bytes(4, "little") + header
