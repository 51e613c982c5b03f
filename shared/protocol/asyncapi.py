"""The protocol as an AsyncAPI 3 document: ``python -m shared.protocol.asyncapi`` writes it.

``asyncapi.yaml`` follows from `shared.protocol.topics` (addresses, QoS, retain), from
`shared.protocol.messages` (payloads) and from the two tables here: which message travels on
which topic, and what answers what. A test keeps the file current, and compares the tables with
the traffic of a real run. Operations are the coordinator's: it receives what devices send, but
for ``echo``, which a device sends to itself.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

import yaml
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from shared.protocol import codec
from shared.protocol.messages import DeviceId, Message, RunId
from shared.protocol.tensors import ITEM_BYTES, MAX_DIMENSIONS
from shared.protocol.topics import (
    COORDINATOR_STATUS,
    DeviceKind,
    RunKind,
    Topic,
    device_topic,
    run_topic,
)

FILE = Path(__file__).with_name("asyncapi.yaml")

Document: TypeAlias = dict[str, Any]

FROM_DEVICE: Mapping[DeviceKind | RunKind, tuple[str, ...]] = {
    "requests": (
        "join_request",
        "piece_request",
        "graphs_request",
        "ready",
        "prepared",
        "evaluation_result",
        "leave",
        "credit",
    ),
    "telemetry": ("heartbeat",),
    "activations": ("activations", "hidden_gradients"),
    "adapter": ("round_result",),
}
FROM_COORDINATOR: Mapping[DeviceKind | RunKind, tuple[str, ...]] = {
    "commands": (
        "welcome",
        "graphs",
        "assignment",
        "accepted",
        "refusal",
        "finished",
        "resend",
        "rejoin",
        "credit",
    ),
    "gradients": ("hidden", "activation_gradients", "evaluated_loss"),
    "handback": ("round_start",),
    "weights": ("piece_bytes",),
}
ANSWERS: Mapping[str, tuple[str, ...]] = {
    "join_request": ("welcome",),
    "piece_request": ("piece_bytes",),
    "graphs_request": ("graphs", "finished"),
    "ready": ("assignment", "finished"),
    "prepared": ("round_start", "assignment", "finished"),
    "activations": ("hidden", "activation_gradients", "evaluated_loss"),
    "hidden_gradients": ("activation_gradients",),
    "evaluation_result": ("accepted",),
    "round_result": ("round_start", "assignment", "finished"),
}
"""What answers a request; any may be refused instead."""

_RUN_KINDS: tuple[RunKind, ...] = get_args(RunKind)
_BINDING = "0.2.0"
_STATUS: Document = {
    "name": "status",
    "summary": "Birth or death notice: plain JSON, neither encoded nor cut into chunks.",
    "contentType": "application/json",
    "payload": {
        "type": "object",
        "required": ["state"],
        "properties": {
            "state": {
                "enum": ["online", "offline", "finished"],
                "description": "Only a coordinator is finished: its run is complete.",
            },
            "instance": {
                "type": "string",
                "description": "The first half of the session ids of this start of the agent.",
            },
        },
    },
}
_ECHO: Document = {
    "name": "echo",
    "summary": "Any bytes: a device measures its link by what the broker passes back to it.",
    "contentType": "application/octet-stream",
    "payload": {"type": "string", "format": "binary"},
}
_TENSOR: JsonSchemaValue = {
    "type": "object",
    "description": "A msgpack extension of type 1; the raw little-endian data follow the header.",
    "required": ["dtype", "shape"],
    "properties": {
        "dtype": {"enum": sorted(ITEM_BYTES)},
        "shape": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "maxItems": MAX_DIMENSIONS,
        },
    },
}


class _Schema(GenerateJsonSchema):
    """pydantic's schema, and one for tensors, which it has none for."""

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        """Return the schema of a tensor: the only foreign class in messages."""
        return _TENSOR


def document() -> Document:
    """Return the whole AsyncAPI document."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "hsplit",
            "version": f"{codec.MAJOR}.{codec.MINOR}.0",
            "description": "Split training over MQTT; PROTOCOL.md tells the story.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/vnd.hsplit",
        "channels": _channels(),
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _topic(kind: DeviceKind | RunKind) -> Topic:
    """Return the topic of one kind with the parameters' names in the place of ids."""
    device = DeviceId("{device}")
    for run_kind in _RUN_KINDS:
        if kind == run_kind:
            return run_topic(RunId("{run}"), device, run_kind)
    return device_topic(device, kind)  # type: ignore[arg-type] # not of a run


def _channels() -> Document:
    channels = {
        "coordinatorStatus": _channel(COORDINATOR_STATUS, ("status",)),
        "status": _channel(_topic("status"), ("status",)),
        "echo": _channel(_topic("echo"), ("echo",)),
    }
    for kind, types in {**FROM_DEVICE, **FROM_COORDINATOR}.items():
        channels[kind] = _channel(_topic(kind), types)
    return channels


def _channel(topic: Topic, types: tuple[str, ...]) -> Document:
    names = {
        "run": "The run's id.",
        "device": "The device's id; a broker's access list lets it write only here.",
    }
    found: Document = {
        "address": topic.name,
        "description": f"The {topic.lane} lane.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in types},
    }
    parameters = {n: {"description": d} for n, d in names.items() if "{" + n + "}" in topic.name}
    return found | ({"parameters": parameters} if parameters else {})


def _operations() -> Document:
    operations: Document = {
        "receiveStatus": _operation("receive", "status", _topic("status"), ("status",)),
        "sendStatus": _operation("send", "coordinatorStatus", COORDINATOR_STATUS, ("status",)),
    }
    for kind, types in FROM_COORDINATOR.items():
        operations[f"send_{kind}"] = _operation("send", kind, _topic(kind), types)
    for kind, types in FROM_DEVICE.items():
        for name in types:
            operation = _operation("receive", kind, _topic(kind), (name,))
            operations[f"receive_{kind}_{name}"] = operation | _reply(name)
    return operations


def _operation(action: str, channel: str, topic: Topic, types: tuple[str, ...]) -> Document:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in types],
        "bindings": {
            "mqtt": {"qos": topic.qos, "retain": topic.retain, "bindingVersion": _BINDING}
        },
    }


def _reply(request: str) -> Document:
    """Return the reply of a request. One of AsyncAPI has one channel: that of the first answer."""
    if request not in ANSWERS:
        return {}
    first, *others = (*ANSWERS[request], "refusal")
    channel = next(kind for kind, types in FROM_COORDINATOR.items() if first in types)
    known = [name for name in (first, *others) if name in FROM_COORDINATOR[channel]]
    elsewhere = [name for name in others if name not in known]
    reply: Document = {
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in known],
    }
    note = {"description": f"Or, on another channel: {', '.join(elsewhere)}."} if elsewhere else {}
    return note | {"reply": reply}


def _messages() -> Document:
    messages: Document = {"status": _STATUS, "echo": _ECHO}
    for name, kind in sorted(_types().items()):
        message: Document = {
            "name": name,
            "title": kind.__name__,
            "summary": " ".join(str(inspect.getdoc(kind)).split()),
            "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
        }
        if "call" in {field.name for field in dataclasses.fields(kind)}:
            message["correlationId"] = {"location": "$message.payload#/call"}
        messages[name] = message
    return messages


def _types() -> Mapping[str, Any]:
    union, _ = get_args(Message)
    return {kind.__dataclass_fields__["type"].default: kind for kind in get_args(union)}


def _schemas() -> Document:
    schema = TypeAdapter(Message).json_schema(
        ref_template="#/components/schemas/{model}", schema_generator=_Schema
    )
    definitions: Document = schema["$defs"]
    for definition in definitions.values():
        # Docstrings hold references in reST, which mean nothing in YAML.
        definition.pop("description", None)
    return dict(sorted(definitions.items()))


def text() -> str:
    """Return the document as YAML."""
    body = yaml.dump(document(), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    return f"# Written by `python -m shared.protocol.asyncapi`; do not edit.\n{body}"


class _Dumper(yaml.SafeDumper):
    """Writes out what occurs twice, instead of an alias."""

    def ignore_aliases(self, data: object) -> bool:
        """Tell that nothing is to be aliased."""
        return True


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
