"""The messages that keep a session going, whatever it is about: part of `messages.Message`.

None of them asks for anything, so none has an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shared.protocol.message_parts import Count, Positive, Session, Text
from shared.protocol.profile import Telemetry

# --- agent to coordinator ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Agent: I live, and this is how I am. ``awaiting``: calls that waited long for an answer."""

    type: Literal["heartbeat"] = "heartbeat"
    session: Session
    awaiting: Annotated[tuple[Count, ...], Field(max_length=256)] = ()
    telemetry: Telemetry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Agent: I stop, for this reason. No answer."""

    type: Literal["leave"] = "leave"
    session: Session
    reason: Text


# --- coordinator to agent ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Resend:
    """Coordinator: these calls that you await never arrived; send them again."""

    type: Literal["resend"] = "resend"
    session: Session
    numbers: Annotated[tuple[Count, ...], Field(min_length=1, max_length=256)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoin:
    """Coordinator: I do not know this session (any more); join again."""

    type: Literal["rejoin"] = "rejoin"
    session: Session


# --- either way -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Receiver of a large transfer: I hold ``chunks`` of its chunks, send on."""

    type: Literal["credit"] = "credit"
    transfer: Count
    chunks: Positive
