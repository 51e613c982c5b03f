"""What a probe's parent tells its child, and what the child says: JSON on stdin and stdout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from shared.protocol.messages import DeviceId
from shared.protocol.profile import BlockPoint, HeadPoint, OptimizerPoint
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

BUDGET_S = 20.0
LEAST_POINTS = 3
"""How many points of blocks `Measurements` must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSpec:
    """All that the child must know.

    ``files``: pieces of the base model by name: embeddings, blocks from 0 on and, with the head
    on the device, its pieces. ``graphs``: those that the backend computes with, by name, if it
    does. ``emulate``: a specification of `edge_agent.emulation`.
    ``memory_bytes``: what training may use in all; None: no limit is known. ``program_bytes``:
    what the agent itself has of the machine's memory; 0: as much as the child at its start.
    """

    backend: str
    device: str | None = None
    threads: int | None = None
    emulate: str | None = None
    config_json: str
    files: Mapping[str, Path]
    device_id: DeviceId
    training: TrainingTerms
    lora: LoraTerms
    optimizer: OptimizerTerms
    micro_batch: int
    length: int
    memory_bytes: int | None = None
    program_bytes: int = 0
    budget_s: float = BUDGET_S
    graphs: Mapping[str, Path] = field(default_factory=dict)

    @property
    def block_count(self) -> int:
        """How many blocks there are files of, from block 0 on."""
        count = 0
        while f"block.{count}" in self.files:
            count += 1
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLine:
    """One line of what the child says: one of these; with ``runtime_bytes`` two more.

    These are ``on_gpu`` and ``computes_with``, see `shared.protocol.profile.DeviceProfile`.

    ``attempt``: what it is about to do, in case that it does not live to say more. ``failure``:
    why it gave up; its exit code is the error's.
    """

    runtime_bytes: int | None = None
    on_gpu: bool = False
    computes_with: str | None = None
    attempt: str | None = None
    block: BlockPoint | None = None
    head: HeadPoint | None = None
    optimizer: OptimizerPoint | None = None
    warning: str | None = None
    failure: str | None = None


SPEC: TypeAdapter[ProbeSpec] = TypeAdapter(ProbeSpec)
LINE: TypeAdapter[ProbeLine] = TypeAdapter(ProbeLine)
