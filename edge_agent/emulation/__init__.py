"""Playing a smaller device, so that an unequal fleet runs on one machine (``--emulate``)."""

from __future__ import annotations

from edge_agent.backends.base import Backend
from edge_agent.emulation.backend import EmulatedBackend
from edge_agent.emulation.link import EmulatedLink
from edge_agent.emulation.spec import EXAMPLE, Emulation, parse_emulation
from shared.transport.base import Transport

__all__ = [
    "EXAMPLE",
    "EmulatedLink",
    "Emulation",
    "emulated",
    "link_of",
    "over_link",
    "parse_emulation",
]


def emulated(backend: Backend, emulation: Emulation | None) -> Backend:
    """Return ``backend`` as slow and small as ``emulation`` says; itself where it says nothing."""
    if emulation is None or (emulation.speed == 1 and emulation.memory_bytes is None):
        return backend
    return EmulatedBackend(backend, emulation)


def link_of(emulation: Emulation | None) -> EmulatedLink | None:
    """Return the link of a device, for all its connections; None where it is the machine's own."""
    return EmulatedLink(emulation) if emulation is not None and emulation.shapes_link else None


def over_link(transport: Transport, link: EmulatedLink | None) -> Transport:
    """Return ``transport`` over ``link``; itself where there is none."""
    return transport if link is None else link.wrap(transport)
