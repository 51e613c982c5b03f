"""paho's client with what large payloads and clean sessions need; the only use of its internals.

Pinned to paho-mqtt 2.1 and 2.2: `tests/broker/test_paho_contract.py` fails when a later
release no longer has, or no longer needs, what is overridden here.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion


class PahoClient(paho.Client):
    """A paho client that writes without copying, never sits on a complete packet, and forgets.

    Threads: as paho's own client. ``on_thread_end`` is called on the network thread when that
    thread ends, for whatever reason.
    """

    def __init__(
        self,
        client_id: str,
        *,
        protocol: MQTTProtocolVersion,
        on_thread_end: Callable[[BaseException | None], None],
    ) -> None:
        """Make an unconnected client; ``client_id`` must be unique on the broker."""
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=protocol,
            # 3.1.1 says it here; MQTT 5 says it in connect_async, and refuses to hear it here.
            clean_session=None if protocol == MQTTProtocolVersion.MQTTv5 else True,
        )
        self.connect_error: OSError | None = None
        """Why the last attempt to reach the broker failed; paho's callback does not say."""
        self.reached = False
        """Whether the last attempt got as far as sending CONNECT."""
        self.tls_error: ssl.SSLError | None = None
        """What TLS said when the last connection broke: TLS 1.3 refuses after its handshake."""
        self._on_thread_end = on_thread_end
        self.on_socket_open = _send_at_once

    def limit_in_flight(self, count: int) -> None:
        """Send at most ``count`` unacknowledged messages; for use in ``on_connect`` only.

        paho's own setter refuses on an open connection, but only there is the broker's
        Receive Maximum known. Nothing is in flight yet, and the limit is never 0.
        """
        with self._out_message_mutex:
            self._max_inflight_messages = max(1, min(self._max_inflight_messages, count))

    def abort(self) -> None:
        """Cut the connection without a goodbye, so that a stuck network thread moves on."""
        sock = self.socket()
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):  # gone already, which is what was wanted
                sock.shutdown(socket.SHUT_RDWR)

    def loop_stop(self) -> MQTTErrorCode:
        """Wait for the network thread to end; close what woke it, and a connection still open.

        paho leaves both to the garbage collector: the second where `disconnect` came while the
        thread was connecting.
        """
        code = super().loop_stop()
        self._reset_sockets()
        return code

    def reconnect(self) -> MQTTErrorCode:
        """Connect again, keeping the reason when that fails."""
        self.reached, self.tls_error = False, None
        try:
            code = super().reconnect()
        except OSError as error:
            self.connect_error = error
            raise
        self.connect_error, self.reached = None, True
        return code

    def _sock_recv(self, bufsize: int) -> bytes:
        """Read, keeping what TLS says; paho calls each reason a lost connection."""
        try:
            return super()._sock_recv(bufsize)
        except ssl.SSLError as error:
            self.tls_error = error
            raise

    def _packet_queue(
        self,
        command: int,
        packet: bytes | bytearray | memoryview,
        mid: int,
        qos: int,
        info: paho.MQTTMessageInfo | None = None,
    ) -> MQTTErrorCode:
        """Queue one packet as a view: paho slices off what was sent, which copies the rest."""
        view = memoryview(packet)
        return super()._packet_queue(command, view, mid, qos, info)  # type: ignore[arg-type]

    def _packet_read(self) -> MQTTErrorCode:
        """Read once more where paho gave up after 100 reads of which the last was enough.

        Without this the complete packet waits until the broker's next byte: a keepalive.
        """
        code = super()._packet_read()
        packet = self._in_packet
        if (
            code == MQTTErrorCode.MQTT_ERR_AGAIN
            and packet["have_remaining"]
            and packet["to_process"] == 0
        ):
            code = super()._packet_read()
        return code

    def _messages_reconnect_reset_out(self) -> None:
        """Forget what was in flight when the link broke.

        The session is new and the protocol repeats what was not answered. paho would send
        all of it at once after reconnecting, ignoring its own in-flight limit.
        """
        with self._out_message_mutex:
            self._inflight_messages = 0
            self._out_messages.clear()

    def _thread_main(self) -> None:
        """Run the network loop; say when it ends, which paho itself does not notice."""
        failure: BaseException | None = None
        try:
            super()._thread_main()
        except Exception as error:  # noqa: BLE001 (the owner must hear of it, whatever it is)
            failure = error
        finally:
            self._on_thread_end(failure)


def _send_at_once(_client: paho.Client, _userdata: object, sock: object) -> None:
    """Turn Nagle's algorithm off: with delayed acknowledgements it costs 88 ms a message."""
    if isinstance(sock, socket.socket | ssl.SSLSocket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
