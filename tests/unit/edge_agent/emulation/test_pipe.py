"""When a packet arrives follows from when all packets were sent: laws of a slow link."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.emulation.pipe import Pipe

RATE, LATENCY_S = 1000.0, 0.5

GAPS_S = st.floats(0, 5, allow_nan=False).map(lambda gap: round(gap, 3))
SIZES = st.integers(0, 5000)
PACKETS = st.lists(st.tuples(GAPS_S, SIZES, st.booleans(), st.integers(0, 2)), max_size=30)
LINKS = st.tuples(st.sampled_from([100.0, RATE, 12345.6]), st.sampled_from([0.0, 0.02, 3.0]))


def pipe(rate: float | None = RATE, latency_s: float = LATENCY_S) -> Pipe[object]:
    return Pipe(bytes_per_s=rate, latency_s=latency_s)


def arrivals(
    one: Pipe[object], *, from_s: float, owners: tuple[int, ...] = (0,)
) -> list[tuple[float, object]]:
    """Wait, as its user does, until nothing more comes; return (time, item) of all that came."""
    found: list[tuple[float, object]] = []
    for owner in owners:
        now_s = from_s
        while True:
            item = one.take(now_s=now_s, owner=owner)
            if item is not None:
                found.append((now_s, item))
                continue
            due_s = one.next_due_s(owner=owner)
            if due_s is None:
                break
            assert due_s >= now_s
            now_s = max(due_s, math.nextafter(now_s, math.inf))
    return found


def run(
    packets: list[tuple[float, int, bool, int]], link: tuple[float, float]
) -> dict[int, tuple[float, float, int, bool, int]]:
    """Send all packets; return number → (sent, arrived, size, urgent, owner)."""
    one: Pipe[object] = pipe(*link)
    sent: dict[int, tuple[float, int, bool, int]] = {}
    arrived: dict[object, float] = {}
    now_s = 0.0
    for number, (gap_s, size, urgent, owner) in enumerate(packets):
        deadline_s = now_s + gap_s
        for each in range(3):  # look whenever something may be due, as threads do
            while True:
                item = one.take(now_s=now_s, owner=each)
                if item is None:
                    break
                arrived[item] = now_s
        while True:
            due_s = [one.next_due_s(owner=each) for each in range(3)]
            following = min((due for due in due_s if due is not None), default=math.inf)
            if following > deadline_s:
                break
            now_s = max(following, math.nextafter(now_s, math.inf))
            for each in range(3):
                while (item := one.take(now_s=now_s, owner=each)) is not None:
                    arrived[item] = now_s
        now_s = max(now_s, deadline_s)
        one.put(number, size, now_s=now_s, owner=owner, urgent=urgent)
        sent[number] = (now_s, size, urgent, owner)
    arrived.update({item: at for at, item in arrivals(one, from_s=now_s, owners=(0, 1, 2))})
    assert arrived.keys() == sent.keys()
    return {
        number: (at, arrived[number], size, urgent, owner)
        for number, (at, size, urgent, owner) in sent.items()
    }


@given(PACKETS, LINKS)
def test_everything_arrives_once_and_in_order_within_a_lane(packets, link):
    rows = run(packets, link)
    for owner in range(3):
        for urgent in (False, True):
            lane = [row[1] for row in rows.values() if row[3] is urgent and row[4] == owner]
            assert lane == sorted(lane)


@given(PACKETS, LINKS)
def test_nothing_arrives_before_it_could(packets, link):
    rate, latency_s = link
    for sent_s, arrived_s, size, _, _ in run(packets, link).values():
        assert arrived_s >= sent_s + size / rate + latency_s - 1e-6


@given(PACKETS, LINKS)
def test_the_line_is_never_idle_while_something_waits(packets, link):
    """The last byte arrives when one queue of this rate would have sent all of it."""
    rate, latency_s = link
    rows = run(packets, link)
    done_s = 0.0
    for sent_s, _, size, _, _ in rows.values():
        done_s = max(done_s, sent_s) + size / rate
    if rows:
        assert max(row[1] for row in rows.values()) == pytest.approx(done_s + latency_s, abs=1e-6)


@given(PACKETS, LINKS)
def test_urgent_packets_wait_for_urgent_packets_alone(packets, link):
    rate, latency_s = link
    done_s = 0.0
    for sent_s, arrived_s, size, urgent, _ in run(packets, link).values():
        if urgent:
            done_s = max(done_s, sent_s) + size / rate
            assert arrived_s == pytest.approx(done_s + latency_s, abs=1e-6)


def test_a_packet_takes_its_size_over_the_rate_and_the_latency():
    one = pipe()
    one.put("a", 2000, now_s=10.0)
    one.put("b", 1000, now_s=10.0)
    assert arrivals(one, from_s=10.0) == [(12.5, "a"), (13.5, "b")]


def test_latency_does_not_hold_up_the_next_packet():
    one = pipe(latency_s=60.0)
    for number in range(3):
        one.put(number, 1000, now_s=0.0)
    assert [at for at, _ in arrivals(one, from_s=0.0)] == [61.0, 62.0, 63.0]


def test_a_rate_without_limit_costs_latency_alone():
    one = pipe(rate=None)
    one.put("large", 10**12, now_s=1.0)
    one.put("small", 1, now_s=1.0, urgent=True)
    assert arrivals(one, from_s=1.0) == [(1.5, "large"), (1.5, "small")]


def test_an_urgent_packet_takes_its_share_from_what_is_half_sent():
    one = pipe()
    one.put("data", 10_000, now_s=0.0)
    one.put("heartbeat", 100, now_s=4.0, urgent=True)
    found = arrivals(one, from_s=4.0)
    assert [item for _, item in found] == ["heartbeat", "data"]
    assert [at for at, _ in found] == pytest.approx([4.6, 10.6])


def test_two_connections_share_one_rate():
    one = pipe()
    for owner in (0, 1):
        one.put(owner, 1000, now_s=0.0, owner=owner)
    assert arrivals(one, from_s=0.0, owners=(0, 1)) == [(1.5, 0), (2.5, 1)]


@given(PACKETS.filter(bool), LINKS, GAPS_S)
def test_what_is_put_last_arrives_at_once_after_all_before_it_and_before_all_after_it(
    packets, link, later_s
):
    one: Pipe[object] = pipe(*link)
    now_s = 0.0
    for number, (gap_s, size, urgent, _) in enumerate(packets):
        now_s += gap_s
        one.put(number, size, now_s=now_s, urgent=urgent)
    one.put_last("down", now_s=now_s)
    one.put("after", 0, now_s=now_s + later_s, urgent=True)
    found = arrivals(one, from_s=now_s)
    items = [item for _, item in found]
    place = items.index("down")
    assert set(items[:place]) <= set(range(len(packets)))
    assert items[place:] == ["down", "after"]
    assert found[place][0] == pytest.approx(found[place - 1][0] if place else now_s, abs=1e-9)


def test_what_is_put_last_into_an_idle_pipe_is_there_at_once():
    one = pipe()
    one.put_last("up", now_s=7.0)
    assert one.take(now_s=7.0) == "up"


@given(PACKETS, LINKS, st.integers(0, 2))
def test_what_is_forgotten_leaves_the_rest_in_order_and_no_later(packets, link, gone):
    """Without the others' packets everybody's come at least as early."""

    def filled() -> tuple[Pipe[object], float]:
        one: Pipe[object] = pipe(*link)
        now_s = 0.0
        for number, (gap_s, size, urgent, owner) in enumerate(packets):
            now_s += gap_s
            one.put((owner, number), size, now_s=now_s, owner=owner, urgent=urgent)
        return one, now_s

    whole, now_s = filled()
    before = {item: at for at, item in arrivals(whole, from_s=now_s, owners=(0, 1, 2))}
    part, now_s = filled()
    dropped = part.forget(gone)
    assert dropped == sum(1 for packet in packets if packet[3] == gone)
    after = {item: at for at, item in arrivals(part, from_s=now_s, owners=(0, 1, 2))}
    assert after.keys() == {item for item in before if item[0] != gone}  # type: ignore[index]
    assert all(at <= before[item] + 1e-6 for item, at in after.items())


def test_looking_early_or_often_changes_nothing():
    times = []
    for looks in ([], [0.1 * n for n in range(40)]):
        one = pipe()
        one.put("a", 1234, now_s=0.0)
        one.put("b", 777, now_s=0.0)
        for now_s in looks:
            if now_s < 1.7:
                assert one.take(now_s=now_s) is None
        times.append([at for at, _ in arrivals(one, from_s=1.7)])
    assert times[0] == pytest.approx(times[1])


def test_pairs_of_packets_are_as_far_apart_as_the_second_one_is_long():
    one = pipe()
    sizes = [100, 900, 300, 5000, 1]
    for number, size in enumerate(sizes):
        one.put(number, size, now_s=0.0)
    at = [at_s for at_s, _ in arrivals(one, from_s=0.0)]
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert gaps == pytest.approx([size / RATE for size in sizes[1:]])
