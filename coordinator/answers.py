"""What the coordinator answers, as functions of what it knows."""

from __future__ import annotations

from typing import Protocol

from coordinator.handback import HandBack
from coordinator.planning.device_plan import DevicePlan
from coordinator.wire_adapters import to_wire
from shared.classifier_weights import ClassifierTensors
from shared.errors import ProtocolError
from shared.protocol import weights
from shared.protocol.messages import (
    Assignment,
    Call,
    DeviceId,
    PieceBytes,
    PieceRequest,
    RoundStart,
)
from shared.protocol.tensors import TensorFrame

MAX_PIECE_BYTES = 4 * 2**20
"""Given at once: more would keep the one thread, and other devices' answers, waiting."""


class Pieces(Protocol):
    """Content that is read by its SHA-256."""

    def read(self, sha256: str, *, offset: int, length: int) -> memoryview:
        """Return bytes of a piece.

        Raises:
            ProtocolError: no such piece, or the range is not inside it.
        """


def piece_bytes(pieces: Pieces, request: PieceRequest) -> PieceBytes:
    """Return the bytes that were asked for.

    Raises:
        ProtocolError: no such piece or range, or too much at once.
    """
    if request.length > MAX_PIECE_BYTES:
        raise ProtocolError(f"{request.length} bytes at once, more than {MAX_PIECE_BYTES}")
    data = pieces.read(request.sha256, offset=request.offset, length=request.length)
    frame = TensorFrame("uint8", (len(data),), data)
    return PieceBytes(call=request.call, sha256=request.sha256, offset=request.offset, data=frame)


def assignment(call: Call, plan: DevicePlan, version: int, *, keep: bool) -> Assignment:
    """Return a device's part; ``keep``: the blocks are those that it holds."""
    return Assignment(
        call=call,
        plan_version=version,
        split_layer=plan.split_layer,
        ranks=dict(plan.ranks),
        batch=plan.batch,
        micro_batch=plan.micro_batch,
        in_flight=plan.in_flight,
        keep=keep,
    )


def round_start(
    call: Call,
    handed: HandBack,
    device: DeviceId,
    *,
    classifier: ClassifierTensors,
    first_step: int,
    steps: int,
    first_sequence: int,
    probe_sequences: int,
) -> RoundStart:
    """Return what a device starts the round from; ``classifier`` empty: it keeps its own."""
    return RoundStart(
        call=call,
        round=handed.round,
        first_step=first_step,
        steps=steps,
        evaluate=True,
        adapters=to_wire(handed.adapters_of(device)),
        fold=handed.fold,
        first_sequence=first_sequence,
        probe_sequences=probe_sequences,
        classifier=weights.to_wire(classifier),
    )
