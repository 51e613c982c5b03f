"""Every message of the protocol, as one frozen dataclass each; PROTOCOL.md tells the story.

The agent asks and the coordinator answers. A message with a ``call`` from the agent is a
request; the message with the same ``call`` from the coordinator is its one answer, and a
repeated request gets the same answer again (`shared.protocol.calls`). Limits are in the
types, so the codec checks them and nobody else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from shared.protocol.message_parts import (
    NAME_PATTERN,
    Adapters,
    AdapterTensors,
    Call,
    Count,
    Device,
    DeviceId,
    DeviceProfile,
    Loss,
    ModelDescription,
    Module,
    Piece,
    Positive,
    Run,
    RunId,
    Seconds,
    Session,
    SessionId,
    Sha256,
    Tensor,
    Text,
)
from shared.terms import LoraTerms, OptimizerTerms, Rank, TrainingTerms

# The parts that belong to this module's interface, beside every class below.
__all__ = [
    "NAME_PATTERN",
    "AdapterTensors",
    "Call",
    "Device",
    "DeviceId",
    "DeviceProfile",
    "ModelDescription",
    "Piece",
    "Run",
    "RunId",
    "SessionId",
]

# --- agent to coordinator ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """Agent: I am here, this is what I can do. Answer: `Welcome` or `Refusal`."""

    type: Literal["join_request"] = "join_request"
    call: Call
    profile: DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRequest:
    """Agent: give me these bytes of a piece. Answer: `PieceBytes`. Asking is the flow control."""

    type: Literal["piece_request"] = "piece_request"
    call: Call
    sha256: Sha256
    offset: Count
    length: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Agent: my data is tokenised, I wait for a part. Answer: `Assignment` or `Finished`."""

    type: Literal["ready"] = "ready"
    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Agent: the weights of this plan are loaded. Answer: `RoundStart`, when a round starts."""

    type: Literal["prepared"] = "prepared"
    call: Call
    plan_version: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Agent: what my front made of one micro-batch.

    ``hidden`` (N, D) in the wire dtype: the N = sum(lengths) real tokens of B sequences, packed
    without padding. ``labels`` (N,) int32 only with `labels: server`: the token to predict at
    each position, -100 where there is none. Answers: training: `ActivationGradients`
    (labels: server) or `Hidden` (labels: device); evaluation: `EvaluatedLoss` or `Hidden`.
    """

    type: Literal["activations"] = "activations"
    call: Call
    purpose: Literal["train", "evaluate"]
    round: Count
    step: Count
    micro_batch: Count
    micro_batches: Positive
    target_tokens: Count
    lengths: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=65_536)]
    hidden: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenGradients:
    """Agent: gradient (N, D) of the micro-batch's summed loss with respect to `Hidden`.

    Answer: `ActivationGradients`.
    """

    type: Literal["hidden_gradients"] = "hidden_gradients"
    call: Call
    round: Count
    step: Count
    micro_batch: Count
    loss_sum: Loss
    gradient: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Agent: summed loss of my held-out part with the state that round ``round`` starts from.

    Answer: `Accepted`.
    """

    type: Literal["evaluation_result"] = "evaluation_result"
    call: Call
    round: Count
    loss_sum: Loss
    target_tokens: Count
    sequences: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """Agent: my adapters after the last step of the round, in float32.

    ``loss_sum`` and ``target_tokens`` are sums over the round's training steps. Answer:
    `RoundStart` of the next round, a new `Assignment`, or `Finished`.
    """

    type: Literal["round_result"] = "round_result"
    call: Call
    round: Count
    adapters: Adapters
    loss_sum: Loss
    target_tokens: Count
    steps: Count
    busy_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Agent: I live. ``awaiting``: calls that have waited long for an answer."""

    type: Literal["heartbeat"] = "heartbeat"
    session: Session
    awaiting: Annotated[tuple[Count, ...], Field(max_length=256)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Agent: I stop, for this reason. No answer."""

    type: Literal["leave"] = "leave"
    session: Session
    reason: Text


# --- coordinator to agent ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Coordinator: you are in; this is the run, its model and its terms."""

    type: Literal["welcome"] = "welcome"
    call: Call
    run_id: Run
    model: ModelDescription
    training: TrainingTerms
    lora: LoraTerms
    optimizer: OptimizerTerms


RefusalCode: TypeAlias = Literal[
    "device_id_in_use",
    "does_not_fit",
    "bad_request",
    "bad_numbers",
    "stale",
    "version",
    "unreadable",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Coordinator: no, and why. ``stale``: too late for its step, wait for the next round."""

    type: Literal["refusal"] = "refusal"
    call: Call | None = None
    code: RefusalCode
    reason: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceBytes:
    """Coordinator: ``data`` (uint8) are the bytes of piece ``sha256`` from ``offset`` on."""

    type: Literal["piece_bytes"] = "piece_bytes"
    call: Call
    sha256: Sha256
    offset: Count
    data: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Coordinator: your part. ``ranks`` names every module of your front that is adapted.

    Each step takes ``batch`` sequences of your data, cut into micro-batches of at most
    ``micro_batch``; ``in_flight`` of these may be on their way at once.
    """

    type: Literal["assignment"] = "assignment"
    call: Call
    plan_version: Count
    split_layer: Positive
    ranks: Annotated[dict[Module, Rank], Field(max_length=65_536)]
    batch: Positive
    micro_batch: Positive
    in_flight: Positive = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStart:
    """Coordinator: the hand-back of the last aggregation, and the round that follows it.

    Steps ``first_step`` … ``first_step + steps - 1`` (``steps`` 0: only evaluate).
    ``adapters`` replaces the named modules' adapters and resets their optimizer moments;
    a module of the plan that is not named keeps both. ``fold``: add each ``frozen`` pair to
    the base weight instead of holding it (`merge`). After an `Assignment` the base is untouched,
    and everything is named.
    """

    type: Literal["round_start"] = "round_start"
    call: Call
    round: Count
    first_step: Count
    steps: Count
    evaluate: bool
    adapters: Adapters
    fold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Coordinator: the back's output (N, D) for the head on the device."""

    type: Literal["hidden"] = "hidden"
    call: Call
    hidden: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationGradients:
    """Coordinator: gradient (N, D) of the summed loss with respect to `Activations`."""

    type: Literal["activation_gradients"] = "activation_gradients"
    call: Call
    gradient: Tensor
    loss_sum: Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedLoss:
    """Coordinator: summed loss of one evaluation micro-batch (labels: server)."""

    type: Literal["evaluated_loss"] = "evaluated_loss"
    call: Call
    loss_sum: Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Coordinator: noted."""

    type: Literal["accepted"] = "accepted"
    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Coordinator: the run is over, for this reason; stop."""

    type: Literal["finished"] = "finished"
    call: Call | None = None
    reason: Text
    failed: bool = False


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


Request: TypeAlias = (
    JoinRequest
    | PieceRequest
    | Ready
    | Prepared
    | Activations
    | HiddenGradients
    | EvaluationResult
    | RoundResult
)
Answer: TypeAlias = (
    Welcome
    | Refusal
    | PieceBytes
    | Assignment
    | RoundStart
    | Hidden
    | ActivationGradients
    | EvaluatedLoss
    | Accepted
    | Finished
)
Message: TypeAlias = Annotated[
    Request | Answer | Heartbeat | Leave | Resend | Rejoin | Credit,
    Field(discriminator="type"),
]
