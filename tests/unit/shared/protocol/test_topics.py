"""The topic table: names that lead back to their ids, and who hears what."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import topics
from shared.protocol.messages import NAME_PATTERN, DeviceId, RunId
from shared.protocol.topics import (
    COORDINATOR_STATUS,
    Address,
    agent_filters,
    coordinator_filters,
    device_topic,
    echo_filters,
    parse,
    run_topic,
)
from shared.transport.memory import matches

RUN, NANO, ORIN = RunId("run-1"), DeviceId("nano"), DeviceId("orin")
DEVICE_KINDS = ("status", "requests", "telemetry", "commands", "echo")
RUN_KINDS = ("activations", "adapter", "gradients", "handback", "weights")
FROM_COORDINATOR = {"commands", "gradients", "handback", "weights"}

names = st.from_regex(NAME_PATTERN, fullmatch=True)


@given(device=names, run=names)
def test_every_topic_leads_back_to_its_ids(device, run):
    for kind in DEVICE_KINDS:
        assert parse(device_topic(device, kind).name) == Address(kind, device)
    for kind in RUN_KINDS:
        assert parse(run_topic(run, device, kind).name) == Address(kind, device, run)


@given(st.text(max_size=40))
def test_what_is_not_in_the_table_has_no_address(name):
    assert parse(name) is None


@pytest.mark.parametrize(
    "name",
    [
        COORDINATOR_STATUS.name,
        "hsplit/v2/devices/nano/status",
        "hsplit/v1/devices/nano",
        "hsplit/v1/devices/nano/secrets",
        "hsplit/v1/devices/nano/status/more",
        "hsplit/v1/devices//status",
        "hsplit/v1/devices/+/status",
        "hsplit/v1/devices/na no/status",
        "hsplit/v1/devices/nano\n/status",
        "hsplit/v1/devices/" + "n" * 65 + "/status",
        "hsplit/v1/runs/run-1/devices/nano/status",
        "hsplit/v1/runs/run-1\n/devices/nano/activations",
    ],
)
def test_a_name_that_is_almost_right_has_no_address(name):
    assert parse(name) is None


def all_topics(device: DeviceId) -> dict[str, topics.Topic]:
    return {
        **{kind: device_topic(device, kind) for kind in DEVICE_KINDS},
        **{kind: run_topic(RUN, device, kind) for kind in RUN_KINDS},
    }


def heard(filters: tuple[topics.Filter, ...], topic: topics.Topic) -> list[str]:
    return [one.lane for one in filters if matches(one.pattern, topic.name)]


def test_an_agent_hears_what_is_for_it_and_nothing_of_any_other():
    filters = agent_filters(NANO)
    for kind, topic in all_topics(NANO).items():
        # Its own status too: it may have to correct an old one that is retained.
        expected = kind in FROM_COORDINATOR or kind == "status"
        assert heard(filters, topic) == [topic.lane] * expected
    assert all(heard(filters, topic) == [] for topic in all_topics(ORIN).values())
    assert heard(filters, COORDINATOR_STATUS) == ["control"]


def test_the_coordinator_hears_what_devices_say_in_its_run_and_not_itself():
    for device in (NANO, ORIN):
        for kind, topic in all_topics(device).items():
            hears = kind not in FROM_COORDINATOR and kind != "echo"
            expected = [topic.lane] if hears else []
            assert heard(coordinator_filters(RUN), topic) == expected
    other = run_topic(RunId("run-2"), NANO, "activations")
    assert heard(coordinator_filters(RUN), other) == []


def test_a_device_that_measures_its_link_hears_itself_and_nothing_else():
    for device in (NANO, ORIN):
        for kind, topic in all_topics(device).items():
            expected = [topic.lane] if kind == "echo" and device == NANO else []
            assert heard(echo_filters(NANO), topic) == expected


def test_the_table_in_the_docstring_is_the_code():
    rows = re.findall(
        r"^(hsplit\S+) +(\d)( +yes)? +(\w+) +(\w+)$", str(topics.__doc__), re.MULTILINE
    )
    table = {name: (int(qos), bool(kept), who, lane) for name, qos, kept, who, lane in rows}
    code = {
        topic.name.replace(RUN, "<run>").replace(NANO, "<device>"): (
            topic.qos,
            topic.retain,
            "coordinator" if kind in FROM_COORDINATOR else "device",
            topic.lane,
        )
        for kind, topic in all_topics(NANO).items()
    }
    code[COORDINATOR_STATUS.name] = (1, True, "coordinator", "control")
    assert table == code
