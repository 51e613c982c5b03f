"""The messages by which a device gets what it computes with: part of `messages.Message`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shared.protocol.message_parts import Call, Count, Piece, Positive, Sha256, Tensor

# --- agent to coordinator ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRequest:
    """Agent: give me these bytes of a piece. Answer: `PieceBytes`. Asking is the flow control."""

    type: Literal["piece_request"] = "piece_request"
    call: Call
    sha256: Sha256
    offset: Count
    length: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphsRequest:
    """Agent: I compute with graphs; which are there? Answer: `Graphs`, or `Finished`.

    The first one of a run may wait for minutes: the graphs are made then.
    """

    type: Literal["graphs_request"] = "graphs_request"
    call: Call


# --- coordinator to agent ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceBytes:
    """Coordinator: ``data`` (uint8) are the bytes of piece ``sha256`` from ``offset`` on."""

    type: Literal["piece_bytes"] = "piece_bytes"
    call: Call
    sha256: Sha256
    offset: Count
    data: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """Coordinator: the graphs of this run, ONNX files without weights, to be fetched as pieces.

    Their names are those of `shared.graphs`.
    """

    type: Literal["graphs"] = "graphs"
    call: Call
    graphs: Annotated[tuple[Piece, ...], Field(max_length=4096)]
