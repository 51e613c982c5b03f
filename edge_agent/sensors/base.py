"""What sensors are to the agent: `Sensors`; and how what several sources say is put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

from shared.protocol.profile import DeviceFacts, Telemetry

_MOST_REASONS = 16

_Said = TypeVar("_Said", DeviceFacts, Telemetry)


class Sensors(Protocol):
    """What is known of the machine. Any thread may call, also several at once; nothing raises.

    A call takes milliseconds; the one during which the GPU's driver hangs takes seconds, once.
    """

    def facts(self) -> DeviceFacts:
        """Return what this device is; what no sensor says is None."""

    def read(self, *, on_gpu: bool | None = None) -> Telemetry:
        """Return how the device is now; what no sensor says is None.

        ``on_gpu``: training computes on the GPU, so that its load, temperature and memory are
        what counts; None: it does where there is one. The CPUs' load is that since the
        previous reading.
        """

    def memory_bytes(self, *, on_gpu: bool) -> int | None:
        """Return what training may use in all, now: what is free, and what this process has.

        Of the GPU with ``on_gpu``, unless that lives in the machine's memory; else of the
        machine, or of the container whose limit is nearer. A reserve is off
        (`machine.reserve_bytes`), so that the machine stays usable. None: no sensor says.
        Never below 1.

        What this process has of a GPU is known on bare metal only, not in a container, nor on a
        Jetson: there, ask before training takes memory.
        """

    def close(self) -> None:
        """Let go of the driver; nothing is read of the GPU after that."""


def merged_facts(said: Sequence[DeviceFacts]) -> DeviceFacts:
    """Return for each field what the first source says that says anything."""
    fields = _first(said)
    shares = any(facts.accelerator_shares_memory for facts in said)
    own = fields.get("accelerator_memory_bytes") is not None
    return DeviceFacts(**fields | {"accelerator_shares_memory": shares and not own})


def merged_telemetry(said: Sequence[Telemetry]) -> Telemetry:
    """Return for each field what the first source says; throttled where any source says so."""
    throttled = [telemetry.throttled for telemetry in said if telemetry.throttled is not None]
    reasons = dict.fromkeys(reason for telemetry in said for reason in telemetry.throttle_reasons)
    together = {
        "throttled": any(throttled) if throttled else None,
        "throttle_reasons": tuple(reasons)[:_MOST_REASONS],
    }
    return Telemetry(**_first(said) | together)


def _first(said: Iterable[_Said]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for source in said:
        for field in dataclasses.fields(source):
            value = getattr(source, field.name)
            if value is not None:
                fields.setdefault(field.name, value)
    return fields
