"""The AsyncAPI file is current and complete, and its tables say what the code says."""

from __future__ import annotations

from typing import get_args

import pytest
import yaml

from shared.protocol import asyncapi
from shared.protocol.asyncapi import ANSWERS, FROM_COORDINATOR, FROM_DEVICE
from shared.protocol.topics import DeviceKind, RunKind, agent_filters, parse
from tests.support.wire_messages import ANSWER_TYPES, MESSAGE_TYPES, REQUEST_TYPES


def named(kinds: tuple[type, ...]) -> set[str]:
    return {kind.__dataclass_fields__["type"].default for kind in kinds}


@pytest.fixture(scope="module")
def document():
    return yaml.safe_load(asyncapi.FILE.read_text(encoding="utf-8"))


def test_the_file_is_current():
    current = asyncapi.FILE.read_text(encoding="utf-8")
    assert current == asyncapi.text(), "run: python -m shared.protocol.asyncapi"


def test_every_topic_and_every_message_has_its_place():
    kinds = {"status", "echo", *FROM_DEVICE, *FROM_COORDINATOR}
    assert kinds == {*get_args(DeviceKind), *get_args(RunKind)}
    assert not FROM_DEVICE.keys() & FROM_COORDINATOR.keys()
    said = {name for types in (*FROM_DEVICE.values(), *FROM_COORDINATOR.values()) for name in types}
    assert said == named(MESSAGE_TYPES)


def test_what_the_coordinator_says_is_what_agents_hear():
    heard = {parse(one.pattern.replace("+", "run")) for one in agent_filters("nano")} - {None}
    assert {address.kind for address in heard} - {"status"} == set(FROM_COORDINATOR)


def test_every_request_has_its_answers_and_every_answer_answers_something():
    assert set(ANSWERS) == named(REQUEST_TYPES)
    answers = {name for names in ANSWERS.values() for name in names} | {"refusal"}
    assert answers == named(ANSWER_TYPES)


def test_every_reference_leads_somewhere(document):
    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(document))
    assert len(found) > 60
    for reference in found:
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_addresses_bindings_and_limits_are_those_of_the_code(document):
    channels, operations = document["channels"], document["operations"]
    address = channels["activations"]["address"]
    assert address == "hsplit/v1/runs/{run}/devices/{device}/activations"
    assert set(channels["activations"]["parameters"]) == {"run", "device"}
    telemetry = operations["receive_telemetry_heartbeat"]["bindings"]["mqtt"]
    assert (telemetry["qos"], telemetry["retain"]) == (0, False)
    assert operations["receiveStatus"]["bindings"]["mqtt"]["retain"]
    schemas = document["components"]["schemas"]
    assert schemas["Call"]["properties"]["session"]["pattern"] == "^[0-9a-f]{16}$"
    assert schemas["Activations"]["properties"]["hidden"]["required"] == ["dtype", "shape"]


def test_the_story_names_every_message_on_its_topic():
    story = asyncapi.FILE.with_name("PROTOCOL.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1].rsplit("/", 1)[1]: row for row in story.splitlines() if "es/<" in row}
    types = {kind.__dataclass_fields__["type"].default: kind.__name__ for kind in MESSAGE_TYPES}
    for kind, names in {**FROM_DEVICE, **FROM_COORDINATOR}.items():
        told = set(rows[kind].split("|")[3].replace("`", " ").split())
        assert told == {types[name] for name in names}
