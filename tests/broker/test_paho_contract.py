"""paho's inner parts are as `PahoClient` expects them, and still need what it adds."""

from __future__ import annotations

import inspect
import socket

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from shared.transport.paho_client import PahoClient

RECORD_BYTES = 16 * 1024
"""What one read gives over TLS."""


class RecordSocket:
    """Gives one packet, record by record, as a TLS socket does; then nothing for now."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def recv(self, size: int) -> bytes:
        if not self._data:
            raise BlockingIOError
        count = min(size, RECORD_BYTES, len(self._data))
        piece, self._data = bytes(self._data[:count]), self._data[count:]
        return piece

    def close(self) -> None:
        """Nothing to close."""


def packet_of_100_reads() -> bytes:
    """Return a QoS 0 PUBLISH on topic `t` whose rest is read by the hundredth read exactly."""
    rest = b"\x00\x01t" + bytes(100 * RECORD_BYTES - 3)
    length, digits = len(rest), bytearray()
    while length:
        length, digit = divmod(length, 128)
        digits.append(digit | (0x80 if length else 0))
    return b"\x30" + bytes(digits) + rest


def arrived(client: paho.Client) -> list[int]:
    """Return the sizes of the messages that one readable socket leads to."""
    sizes: list[int] = []
    client.on_message = lambda _client, _userdata, message: sizes.append(len(message.payload))
    client._sock = RecordSocket(packet_of_100_reads())
    client.loop_read()
    client._sock = None
    return sizes


def our_client() -> PahoClient:
    return PahoClient(
        "client", protocol=MQTTProtocolVersion.MQTTv311, on_thread_end=lambda _error: None
    )


def test_a_packet_that_took_100_reads_is_delivered_at_once():
    assert arrived(our_client()) == [100 * RECORD_BYTES - 3]


def test_paho_itself_still_sits_on_such_a_packet():
    # When this fails paho has mended it, and PahoClient._packet_read can go.
    assert arrived(paho.Client(CallbackAPIVersion.VERSION2)) == []


def test_what_is_partly_sent_is_a_view_so_that_slicing_it_copies_nothing():
    client = our_client()
    client._in_callback_mutex.acquire()  # as in a callback: paho then only queues
    client._packet_queue(paho.PUBLISH, bytearray(1000), 1, 0)
    packet = client._out_packet[0]["packet"]
    assert isinstance(packet[10:], memoryview)


def test_unanswered_messages_are_forgotten_when_the_connection_is_made_again():
    client = our_client()
    client.publish("t", b"never acknowledged", qos=1)
    assert len(client._out_messages) == 1
    client._messages_reconnect_reset()
    assert (len(client._out_messages), client._inflight_messages) == (0, 0)


def test_the_in_flight_limit_only_shrinks():
    client = our_client()
    client.max_inflight_messages = 64
    client.limit_in_flight(20)
    assert client.max_inflight_messages == 20
    client.limit_in_flight(65535)
    assert client.max_inflight_messages == 20


def test_sockets_send_small_packets_at_once():
    client = our_client()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client.connect_async("127.0.0.1", server.getsockname()[1])
        assert client.reconnect() == MQTTErrorCode.MQTT_ERR_SUCCESS
        sock = client.socket()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        client._sock_close()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_packet_read", ["self"]),
        ("_sock_recv", ["self", "bufsize"]),
        ("_reset_sockets", ["self", "sockpair_only"]),
        ("_packet_queue", ["self", "command", "packet", "mid", "qos", "info"]),
        ("_messages_reconnect_reset_out", ["self"]),
        ("_thread_main", ["self"]),
        ("reconnect", ["self"]),
    ],
)
def test_what_is_overridden_is_still_there_with_the_same_parameters(
    name: str, parameters: list[str]
):
    assert list(inspect.signature(getattr(paho.Client, name)).parameters) == parameters
