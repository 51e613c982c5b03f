"""The terms of a run: what the coordinator decides once and every device obeys.

The same frozen classes are read from the run's YAML file (the coordinator's settings forbid
unknown keys) and travel in the `Welcome` message (where a newer sender may add fields).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt, MaxLen

Task: TypeAlias = Literal["causal-lm", "classification"]
"""What is learnt: to write the next token, or to say of which class a text is."""

LabelMode: TypeAlias = Literal["device", "server"]
"""Which side holds the head and computes the loss."""

WireDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
ComputeDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
HandBackMode: TypeAlias = Literal["residual", "merge", "svd", "zero-pad", "average"]
"""What holders of adapters get after an aggregation. The last three lose something."""

MOST_CLASSES = 1000

Rank: TypeAlias = Annotated[int, Ge(0), Le(4096)]
Alpha: TypeAlias = Annotated[float, Gt(0), Lt(1e6)]
Probability: TypeAlias = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTerms:
    """Which modules are adapted, and how strongly: PEFT's words and PEFT's matching rules.

    ``target_modules`` are suffixes of module paths; empty means the family's default.
    ``rank_pattern`` and ``alpha_pattern`` map a regular expression, matched against the end
    of the module path as PEFT does, to a rank or an alpha that replaces ``r`` / ``lora_alpha``.
    ``freeze_a``: A stays as it was initialised and only B is trained (FFA-LoRA).
    """

    r: Rank = 8
    lora_alpha: Alpha = 16.0
    lora_dropout: Probability = 0.0
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Alpha] = field(default_factory=dict)
    freeze_a: bool = False

    def rank_of(self, module: str) -> int:
        """Return the rank of one module path; 0 means that it is not adapted."""
        return int(_look_up(self.rank_pattern, module, self.r))

    def alpha_of(self, module: str) -> float:
        """Return lora_alpha of one module path."""
        return float(_look_up(self.alpha_pattern, module, self.lora_alpha))


def _look_up(pattern: Mapping[str, float], module: str, default: float) -> float:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerTerms:
    """The optimizer and learning-rate schedule, the same on every side.

    The schedule is driven by the global step: linear warm-up over ``warmup_steps``, then
    ``schedule`` down to ``min_learning_rate_ratio`` of the peak at the run's last step.
    Where a hand-back resets the moments, the rate climbs again over ``rewarm_steps``.
    Gradients of each side's adapters are clipped to ``max_grad_norm`` (0: not clipped).
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Gt(0), Lt(1e3)] = 2e-4
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    epsilon: Annotated[float, Gt(0), Lt(1)] = 1e-8
    weight_decay: Annotated[float, Ge(0), Lt(10)] = 0.01
    warmup_steps: Annotated[int, Ge(0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    min_learning_rate_ratio: Annotated[float, Ge(0), Le(1)] = 0.0
    rewarm_steps: Annotated[int, Ge(0)] = 5
    max_grad_norm: Annotated[float, Ge(0), Lt(1e6)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingChoices:
    """Everything else that both sides of the cut must do alike, as far as a person chooses it.

    ``max_length`` in tokens: longer sequences are cut. ``wire_dtype``: dtype of activations
    and gradients on the wire. ``dtype``: dtype the frozen base is held and computed in
    (adapters are float32 always). ``evaluate_batch``: sequences per evaluation micro-batch.
    ``classes``: the names of all classes in their order, where the ``task`` is classification.
    ``int8_blocks``: of so many blocks, from 0 on, the weights of linear modules are rounded to 8
    bits, on every side alike; see `shared.int8_weights`.
    """

    task: Task = "causal-lm"
    classes: Annotated[tuple[str, ...], MaxLen(MOST_CLASSES)] = ()
    labels: LabelMode = "device"
    wire_dtype: WireDtype = "bfloat16"
    dtype: ComputeDtype = "float32"
    max_length: Annotated[int, Ge(2), Le(1_048_576)] = 512
    evaluate_batch: Annotated[int, Ge(1), Le(4096)] = 16
    int8_blocks: Annotated[int, Ge(0), Le(100_000)] = 0
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTerms(TrainingChoices):
    """The choices, and what follows from others: ``total_steps``, rounds times steps."""

    total_steps: Annotated[int, Ge(1)] = 100
