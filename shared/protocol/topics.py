"""Every topic: its name, QoS, whether it is retained, who may publish on it, and which lane.

No string with a slash in it appears elsewhere. ``hsplit/v1`` carries the major version.

=====================================================  ===  ========  ===========  =======
topic                                                  QoS  retained  published by  lane
=====================================================  ===  ========  ===========  =======
hsplit/v1/coordinator/status                            1   yes       coordinator  control
hsplit/v1/devices/<device>/status                       1   yes       device       control
hsplit/v1/devices/<device>/requests                     1             device       control
hsplit/v1/devices/<device>/telemetry                    0             device       control
hsplit/v1/devices/<device>/commands                     1             coordinator  control
hsplit/v1/devices/<device>/echo                         1             device       data
hsplit/v1/runs/<run>/devices/<device>/activations       1             device       data
hsplit/v1/runs/<run>/devices/<device>/adapter           1             device       data
hsplit/v1/runs/<run>/devices/<device>/gradients         1             coordinator  data
hsplit/v1/runs/<run>/devices/<device>/handback          1             coordinator  data
hsplit/v1/runs/<run>/devices/<device>/weights           1             coordinator  data
=====================================================  ===  ========  ===========  =======
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shared.protocol.messages import NAME_PATTERN, DeviceId, RunId

ROOT = "hsplit/v1"

Lane: TypeAlias = Literal["control", "data"]
DeviceKind: TypeAlias = Literal["status", "requests", "telemetry", "commands", "echo"]
RunKind: TypeAlias = Literal["activations", "adapter", "gradients", "handback", "weights"]

_NAME = re.compile(NAME_PATTERN)
_DEVICE_KINDS: tuple[DeviceKind, ...] = ("status", "requests", "telemetry", "commands", "echo")
_RUN_KINDS: tuple[RunKind, ...] = ("activations", "adapter", "gradients", "handback", "weights")


@dataclass(frozen=True, slots=True)
class Topic:
    """One exact topic to publish on."""

    name: str
    qos: Literal[0, 1] = 1
    retain: bool = False
    lane: Lane = "control"


@dataclass(frozen=True, slots=True)
class Filter:
    """One subscription; ``pattern`` may hold MQTT wildcards."""

    pattern: str
    lane: Lane = "control"


@dataclass(frozen=True, slots=True)
class Address:
    """What a topic name says: which device and kind, and the run where there is one."""

    kind: DeviceKind | RunKind
    device: DeviceId
    run: RunId | None = None


COORDINATOR_STATUS = Topic(f"{ROOT}/coordinator/status", retain=True)


def device_topic(device: DeviceId, kind: DeviceKind) -> Topic:
    """Return the topic of one device that belongs to no run."""
    return Topic(
        f"{ROOT}/devices/{device}/{kind}",
        qos=0 if kind == "telemetry" else 1,
        retain=kind == "status",
        lane="data" if kind == "echo" else "control",
    )


def run_topic(run: RunId, device: DeviceId, kind: RunKind) -> Topic:
    """Return the topic that carries one kind of tensor of one device in one run."""
    return Topic(f"{ROOT}/runs/{run}/devices/{device}/{kind}", lane="data")


def agent_filters(device: DeviceId) -> tuple[Filter, ...]:
    """Return what an agent subscribes to: only what is meant for this device."""
    return (
        Filter(COORDINATOR_STATUS.name),
        Filter(device_topic(device, "status").name),
        Filter(device_topic(device, "commands").name),
        *(
            Filter(f"{ROOT}/runs/+/devices/{device}/{kind}", lane="data")
            for kind in ("gradients", "handback", "weights")
        ),
    )


def echo_filters(device: DeviceId) -> tuple[Filter, ...]:
    """Return what a device subscribes to in order to measure its link: its own echo."""
    return (Filter(device_topic(device, "echo").name, lane="data"),)


def coordinator_filters(run: RunId) -> tuple[Filter, ...]:
    """Return what the coordinator of ``run`` subscribes to."""
    return (
        Filter(COORDINATOR_STATUS.name),
        *(Filter(f"{ROOT}/devices/+/{kind}") for kind in ("status", "requests", "telemetry")),
        *(
            Filter(f"{ROOT}/runs/{run}/devices/+/{kind}", lane="data")
            for kind in ("activations", "adapter")
        ),
    )


def parse(name: str) -> Address | None:
    """Return the ids in a topic name, or None where it is not a device's topic of ours."""
    if not name.startswith(ROOT + "/"):
        return None
    parts = name[len(ROOT) + 1 :].split("/")
    match parts:
        case ["devices", device, kind] if kind in _DEVICE_KINDS and _NAME.fullmatch(device):
            return Address(_DEVICE_KINDS[_DEVICE_KINDS.index(kind)], DeviceId(device))
        case ["runs", run, "devices", device, kind] if (
            kind in _RUN_KINDS and _NAME.fullmatch(run) and _NAME.fullmatch(device)
        ):
            return Address(_RUN_KINDS[_RUN_KINDS.index(kind)], DeviceId(device), RunId(run))
    return None
