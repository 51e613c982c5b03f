"""Every message of the protocol, as one frozen dataclass each; PROTOCOL.md tells the story.

The agent asks and the coordinator answers. A message with a ``call`` from the agent is a
request; the message with the same ``call`` from the coordinator is its one answer, and a
repeated request gets the same answer again (`shared.protocol.calls`). Limits are in the
types, so the codec checks them and nobody else does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from shared.class_counts import ClassCounts
from shared.protocol.message_parts import (
    NAME_PATTERN,
    Adapters,
    AdapterTensors,
    Call,
    ClassifierWeights,
    Count,
    Device,
    DeviceId,
    Loss,
    ModelDescription,
    Module,
    Piece,
    Positive,
    RefusalCode,
    Run,
    RunId,
    Score,
    Seconds,
    SessionId,
    Tensor,
    Text,
    WeightTensor,
)
from shared.protocol.profile import DataShape, DeviceProfile, Measurements
from shared.protocol.session_messages import Credit, Heartbeat, Leave, Rejoin, Resend
from shared.protocol.weight_messages import Graphs, GraphsRequest, PieceBytes, PieceRequest
from shared.terms import MOST_CLASSES, LoraTerms, OptimizerTerms, Rank, TrainingTerms

# The parts that belong to this module's interface, beside every class below.
__all__ = [
    "NAME_PATTERN",
    "AdapterTensors",
    "Call",
    "Credit",
    "Device",
    "DeviceId",
    "DeviceProfile",
    "Graphs",
    "GraphsRequest",
    "Heartbeat",
    "Leave",
    "ModelDescription",
    "Piece",
    "PieceBytes",
    "PieceRequest",
    "RefusalCode",
    "Rejoin",
    "Resend",
    "Run",
    "RunId",
    "SessionId",
    "WeightTensor",
]

Counts: TypeAlias = Annotated[ClassCounts, Field(max_length=MOST_CLASSES)]
"""How a classifier chose, by class; empty: nothing was classified."""

# --- agent to coordinator ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """Agent: I am here, this is what I can do. Answer: `Welcome` or `Refusal`."""

    type: Literal["join_request"] = "join_request"
    call: Call
    profile: DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Agent: my data is tokenised, I wait for a part. Answer: `Assignment` or `Finished`.

    ``measurements`` where `Welcome` asked for them. ``overloaded``: why the part that this device
    had was too much for it; it takes no further part in the open round.
    """

    type: Literal["ready"] = "ready"
    call: Call
    data: DataShape | None = None
    measurements: Measurements | None = None
    overloaded: Text | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Agent: the weights of this plan are loaded. Answer: `RoundStart`, when a round starts.

    ``refused``: why they could not be; the answer then is another `Assignment`, or a `Refusal`.
    """

    type: Literal["prepared"] = "prepared"
    call: Call
    plan_version: Count
    refused: Text | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Agent: what my front made of one micro-batch.

    ``hidden`` (N, D) in the wire dtype: the N = sum(lengths) real tokens of B sequences, packed
    without padding. ``labels`` (N,) int32 only with `labels: server`: the token to predict at
    each position, or the class at the one that a classifier reads; -100 where there is none.
    ``target_tokens``: how many there are. Answers: training: `ActivationGradients`
    (labels: server) or `Hidden` (labels: device); evaluation: `EvaluatedLoss` or `Hidden`.
    ``purpose`` probe: as in training, but only to measure how important weights are; nothing
    is learnt from it.
    """

    type: Literal["activations"] = "activations"
    call: Call
    purpose: Literal["train", "evaluate", "probe"]
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
    """Agent: gradient (M, D) of the micro-batch's summed loss with respect to `Hidden`.

    Answer: `ActivationGradients`.
    """

    type: Literal["hidden_gradients"] = "hidden_gradients"
    call: Call
    round: Count
    step: Count
    micro_batch: Count
    loss_sum: Loss
    gradient: Tensor
    purpose: Literal["train", "probe"] = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Agent: summed loss of my held-out part with the state that round ``round`` starts from.

    ``importance`` where `RoundStart` asked for a probe: module → Σ_j |w_j ∂L/∂w_j| of the summed
    loss over ``probe_tokens`` target tokens, for the candidates in this device's front.
    ``counts``: how the classifier chose, where that is the task. Answer: `Accepted`.
    """

    type: Literal["evaluation_result"] = "evaluation_result"
    call: Call
    round: Count
    loss_sum: Loss
    target_tokens: Count
    sequences: Count
    importance: Annotated[dict[Module, Score], Field(max_length=65_536)] = field(
        default_factory=dict
    )
    probe_tokens: Count = 0
    counts: Counts = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """Agent: my adapters after the last step of the round, in float32.

    ``classifier``: all of its weights, where this device holds one. ``loss_sum`` and
    ``target_tokens`` are sums over the round's training steps; ``busy_s`` is how long these took,
    ``compute_s`` how much of it this device computed. Answer: `RoundStart` of the next round, a
    new `Assignment`, or `Finished`.
    """

    type: Literal["round_result"] = "round_result"
    call: Call
    round: Count
    adapters: Adapters
    loss_sum: Loss
    target_tokens: Count
    steps: Count
    busy_s: Seconds
    compute_s: Seconds = 0.0
    classifier: ClassifierWeights = ()


# --- coordinator to agent ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Coordinator: you are in; this is the run, its model and its terms.

    ``measure_at``: before `Ready`, measure yourself with this many sequences in a micro-batch.
    """

    type: Literal["welcome"] = "welcome"
    call: Call
    run_id: Run
    model: ModelDescription
    training: TrainingTerms
    lora: LoraTerms
    optimizer: OptimizerTerms
    measure_at: Positive | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Coordinator: no, and why. ``stale``: too late for its step, wait for the next round."""

    type: Literal["refusal"] = "refusal"
    call: Call | None = None
    code: RefusalCode
    reason: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Coordinator: your part. ``ranks`` names every module of your front that is adapted.

    Each step takes ``batch`` sequences of your data, cut into micro-batches of at most
    ``micro_batch``; ``in_flight`` of these may be on their way at once. ``keep``: the blocks
    are those that you hold; keep them, with their adapters and moments.
    """

    type: Literal["assignment"] = "assignment"
    call: Call
    plan_version: Count
    split_layer: Positive
    ranks: Annotated[dict[Module, Rank], Field(max_length=65_536)]
    batch: Positive
    micro_batch: Positive
    in_flight: Positive = 2
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStart:
    """Coordinator: the hand-back of the last aggregation, and the round that follows it.

    Steps ``first_step`` … ``first_step + steps - 1`` (``steps`` 0: only evaluate).
    ``adapters`` replaces the named modules' adapters and resets their optimizer moments;
    a module of the plan that is not named keeps both. ``fold``: add each ``frozen`` pair to
    the base weight instead of holding it (`merge`). After an `Assignment` without ``keep`` the
    base is untouched, and everything is named. ``first_sequence``: where in the endless order of
    its sequences the device goes on (None: at ``first_step`` times its batch).
    ``probe_sequences``: after the evaluation, measure the importance of your weights on this many
    sequences of your training data. ``classifier``: replaces yours, as ``adapters`` do; empty:
    keep it.
    """

    type: Literal["round_start"] = "round_start"
    call: Call
    round: Count
    first_step: Count
    steps: Count
    evaluate: bool
    adapters: Adapters
    fold: bool = False
    first_sequence: Count | None = None
    probe_sequences: Count = 0
    classifier: ClassifierWeights = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Coordinator: the back's output for the head on the device.

    ``hidden`` (M, D): all N tokens; for a classifier only the one of each sequence that it reads.
    """

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
    """Coordinator: summed loss of one evaluation micro-batch (labels: server).

    ``counts``: how a classifier chose.
    """

    type: Literal["evaluated_loss"] = "evaluated_loss"
    call: Call
    loss_sum: Loss
    counts: Counts = ()


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


Request: TypeAlias = (
    JoinRequest
    | PieceRequest
    | GraphsRequest
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
    | Graphs
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
