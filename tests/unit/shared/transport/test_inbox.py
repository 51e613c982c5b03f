"""The queue between paho's threads and the owner's: bounded, in order, never in the way."""

from __future__ import annotations

import logging
import signal
import threading

import pytest

from shared.transport.base import Delivery
from shared.transport.inbox import Inbox


def test_items_come_out_in_order_and_none_where_there_is_none():
    inbox: Inbox[str] = Inbox()
    inbox.offer(Delivery("t", b"1"))
    inbox.push("up")
    inbox.offer(Delivery("t", b"2"))
    assert [inbox.take(0) for _ in range(4)] == [
        Delivery("t", b"1"),
        "up",
        Delivery("t", b"2"),
        None,
    ]


@pytest.mark.parametrize("bounds", [{"max_bytes": 10}, {"max_deliveries": 2}])
def test_a_full_queue_drops_the_newest_delivery_and_no_notice(bounds: dict[str, int]):
    inbox: Inbox[str] = Inbox(**bounds)
    assert [inbox.offer(Delivery("t", bytes(5))) for _ in range(3)] == [True, True, False]
    inbox.push("down")
    assert inbox.dropped == 1
    assert [inbox.take(0) for _ in range(3)] == [Delivery("t", bytes(5))] * 2 + ["down"]


def test_room_comes_back_as_deliveries_are_taken():
    inbox: Inbox[str] = Inbox(max_bytes=10)
    inbox.offer(Delivery("t", bytes(10)))
    inbox.take(0)
    assert inbox.offer(Delivery("t", bytes(10)))


def test_a_flood_is_counted_in_few_log_lines(caplog: pytest.LogCaptureFixture):
    inbox: Inbox[str] = Inbox(max_deliveries=0)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            inbox.offer(Delivery("t", b""))
    assert inbox.dropped == 1000
    assert len(caplog.records) == 10
    assert "512 dropped" in caplog.text


def test_take_wakes_up_when_another_thread_delivers():
    inbox: Inbox[str] = Inbox()
    writer = threading.Thread(target=inbox.offer, args=(Delivery("t", b"late"),))
    writer.start()
    assert inbox.take(10) == Delivery("t", b"late")
    writer.join()


class Stopped(BaseException):
    """What a signal's handler raises, as those of SIGINT and SIGTERM do."""


def test_a_signal_that_raises_while_it_waits_leaves_no_lock_behind():
    inbox: Inbox[str] = Inbox()

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        for _ in range(500):
            with pytest.raises(Stopped):  # noqa: PT012 - it comes anywhere in here
                signal.setitimer(signal.ITIMER_VIRTUAL, 2e-4)
                while True:
                    inbox.take(0.0)
            thread = threading.Thread(target=inbox.push, args=("connected",), daemon=True)
            thread.start()
            thread.join(10.0)
            assert not thread.is_alive(), "the network's thread waits for ever"
            assert inbox.take(0.0) == "connected"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
