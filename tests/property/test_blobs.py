"""A piece arrives whole and in order, whatever the link repeats, reorders or loses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.protocol.blobs import Range, RangePlan


@settings(deadline=None)  # the cores are shared
@given(
    content=st.binary(min_size=1, max_size=400),
    range_bytes=st.integers(1, 50),
    window=st.integers(1, 6),
    link=st.data(),
)
def test_a_piece_arrives_whole_whatever_the_link_does(content, range_bytes, window, link):
    written = bytearray()
    plan = RangePlan(len(content), range_bytes=range_bytes)
    on_the_way: list[Range] = []
    while not plan.complete:
        on_the_way += plan.ask(window)
        assert plan.outstanding <= window
        assert on_the_way, "neither complete nor asking"
        arrived = on_the_way[link.draw(st.integers(0, len(on_the_way) - 1))]
        fate = link.draw(st.sampled_from(["deliver", "deliver", "deliver", "repeat", "break"]))
        if fate == "break":  # the session is lost, with all that was asked and all that waited
            plan = RangePlan(len(content), have=len(written), range_bytes=range_bytes)
            on_the_way.clear()
            continue
        if fate == "deliver":
            on_the_way.remove(arrived)
        for data in plan.place(arrived.offset, content[arrived.offset : arrived.end]):
            written += data
        assert bytes(written) == content[: len(written)], "the file is always a true beginning"
        assert plan.written_bytes == len(written)
        if fate == "repeat":
            on_the_way = [one for one in on_the_way if one.offset >= plan.written_bytes]
    assert bytes(written) == content
    assert plan.ask(window) == ()


@given(have=st.integers(0, 100), range_bytes=st.integers(1, 120))
def test_only_what_is_missing_is_asked_for_and_each_byte_once(have, range_bytes):
    ranges = RangePlan(100, have=have, range_bytes=range_bytes).ask(1000)
    asked = [byte for one in ranges for byte in range(one.offset, one.end)]
    assert asked == list(range(have, 100))


@pytest.mark.parametrize("length", [0, 9, 11])
def test_an_answer_of_another_length_is_refused_and_changes_nothing(length):
    plan = RangePlan(100, range_bytes=10)
    plan.ask(2)
    with pytest.raises(ProtocolError, match="asked for 10 bytes from 0 on, got"):
        plan.place(0, bytes(length))
    assert plan.outstanding == 2
    assert plan.place(0, bytes(10)) == (bytes(10),)


def test_what_nobody_asked_for_is_not_written():
    plan = RangePlan(100, range_bytes=10)
    assert plan.place(0, bytes(10)) == ()
    assert plan.written_bytes == 0


@pytest.mark.parametrize("have", [-1, 101])
def test_an_impossible_beginning_is_refused(have):
    with pytest.raises(ValueError, match="impossible"):
        RangePlan(100, have=have)
