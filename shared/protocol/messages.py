"""Every message of the protocol, as one frozen dataclass each; PROTOCOL.md tells the story.

The agent asks and the coordinator answers. A message with a ``call`` from the agent is a
request; the message with the same ``call`` from the coordinator is its one answer, and a
repeated request gets the same answer again (`shared.protocol.calls`). Limits are in the
types, so the codec checks them and nobody else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NewType, TypeAlias

from pydantic import Field, InstanceOf

from shared.protocol.tensors import TensorFrame
from shared.terms import LoraTerms, OptimizerTerms, Rank, TrainingTerms

DeviceId = NewType("DeviceId", str)
RunId = NewType("RunId", str)
SessionId = NewType("SessionId", str)
"""One start of one agent: made anew each time, so that a restart is told from a repeat."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Sha256: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Device: TypeAlias = Annotated[DeviceId, Field(pattern=NAME_PATTERN)]
Run: TypeAlias = Annotated[RunId, Field(pattern=NAME_PATTERN)]
Session: TypeAlias = Annotated[SessionId, Field(pattern=r"^[0-9a-f]{16}$")]
Module: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
"""A full module path in the Hugging Face model."""
Text: TypeAlias = Annotated[str, Field(max_length=4096)]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Positive: TypeAlias = Annotated[int, Field(ge=1, lt=2**31)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]
Loss: TypeAlias = Annotated[float, Field(ge=0, lt=1e12, allow_inf_nan=False)]
"""A sum of negative log-likelihoods in nats; finite, so a diverged model is refused."""
Scale: TypeAlias = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
Tensor: TypeAlias = InstanceOf[TensorFrame]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Names one request of one session; its answer carries the same.

    Numbers of a session count up from 0. Every call below ``answered_below`` has had its
    answer, so the coordinator may forget those.
    """

    session: Session
    number: Count
    answered_below: Count = 0


# --- parts of messages ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a device says of itself when it joins; every measured field is optional."""

    backend: Annotated[str, Field(max_length=64)]
    hsplit_version: Annotated[str, Field(max_length=64)]
    machine: Text = ""
    accelerator: Text | None = None
    memory_limit_bytes: Positive | Count | None = None
    sequences: Positive
    evaluation_sequences: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One content-addressed part of the base model: a safetensors file or tokenizer.json.

    ``name`` is ``tokenizer``, ``embeddings``, ``block.<j>``, ``final_norm`` or ``head``.
    """

    name: Annotated[str, Field(pattern=r"^(tokenizer|embeddings|final_norm|head|block\.\d{1,4})$")]
    sha256: Sha256
    size_bytes: Positive | Count


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What a device must know of the base model, apart from its weights."""

    name: Text
    config_json: Annotated[str, Field(max_length=262_144)]
    pieces: Annotated[tuple[Piece, ...], Field(max_length=4096)]
    chat_template: Annotated[str, Field(max_length=262_144)] | None = None
    eos_token_id: Count | None = None
    special_tokens: Annotated[dict[str, str], Field(max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTensors:
    """One module's adapter on the wire: ``trainable`` A (R, I) and B (O, R), and a frozen rest."""

    module: Module
    a: Tensor
    b: Tensor
    scaling: Scale
    frozen_a: Tensor | None = None
    frozen_b: Tensor | None = None


Adapters: TypeAlias = Annotated[tuple[AdapterTensors, ...], Field(max_length=65_536)]

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
    "not_wanted",
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
    the base weight instead of holding it (`merge`), on top of what was folded up to round
    ``folded_round`` (0: on the untouched base).
    """

    type: Literal["round_start"] = "round_start"
    call: Call
    round: Count
    first_step: Count
    steps: Count
    evaluate: bool
    adapters: Adapters
    fold: bool = False
    folded_round: Count = 0


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
