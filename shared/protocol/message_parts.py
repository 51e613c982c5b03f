"""What messages are made of: ids, types with limits, and parts that several messages share.

Others import what they need of it from `shared.protocol.messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NewType, TypeAlias

from pydantic import Field, InstanceOf

from shared.protocol.tensors import TensorFrame

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
Score: TypeAlias = Annotated[float, Field(ge=0, lt=1e15, allow_inf_nan=False)]
Tensor: TypeAlias = InstanceOf[TensorFrame]
_PIECE_NAME = r"^(tokenizer|embeddings|final_norm|head|block\.\d{1,4}|graph\.[a-z0-9_.]{1,64})$"


RefusalCode: TypeAlias = Literal[
    "device_id_in_use",
    "does_not_fit",
    "bad_request",
    "bad_numbers",
    "outlier",
    "left_out",
    "stale",
    "version",
    "unreadable",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Names one request of one session; its answer carries the same.

    Numbers of a session count up from 0. Every call below ``answered_below`` has had its
    answer, so the coordinator may forget those.
    """

    session: Session
    number: Count
    answered_below: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One content-addressed file: a safetensors file of the base model, its tokenizer, or a graph.

    ``name`` is ``tokenizer``, ``embeddings``, ``block.<j>``, ``final_norm`` or ``head``, or a name
    of `shared.graphs`.
    """

    name: Annotated[str, Field(pattern=_PIECE_NAME)]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTensor:
    """One weight of a classifier on the wire, float32, by its full name."""

    name: Module
    data: Tensor


ClassifierWeights: TypeAlias = Annotated[tuple[WeightTensor, ...], Field(max_length=16)]
"""All weights of a classifier; empty: none."""
