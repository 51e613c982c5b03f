"""What one device does: `DevicePlan`, and which modules it adapts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.architecture import ModelArchitecture
from shared.terms import LoraTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """One device's part. ``ranks`` and ``scalings`` (alpha / rank) by full module path."""

    split_layer: int
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    batch: int
    micro_batch: int
    in_flight: int


def adapted(
    lora: LoraTerms, architecture: ModelArchitecture, blocks: range
) -> tuple[dict[str, int], dict[str, float]]:
    """Return rank and scaling (alpha / rank) of every module of ``blocks`` that is adapted."""
    ranks = architecture.target_modules(lora, blocks=blocks)
    return ranks, {module: lora.alpha_of(module) / rank for module, rank in ranks.items()}


def adaptable_shapes(
    lora: LoraTerms, architecture: ModelArchitecture
) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every module that any device may adapt, whatever its rank."""
    all_of_them = LoraTerms(r=1, target_modules=lora.target_modules)
    modules = architecture.target_modules(all_of_them, blocks=range(architecture.block_count))
    features = {module: architecture.features(module) for module in modules}
    return {module: (f[1], f[0]) for module, f in features.items()}


def ranks_in_short(ranks: Mapping[str, int]) -> str:
    """Return the ranks for people: ``8``, or ``4 to 16 (27 modules)`` where they differ."""
    values = set(ranks.values())
    if not values:
        return "none"
    if len(values) == 1:
        return str(values.pop())
    return f"{min(values)} to {max(values)} ({len(ranks)} modules)"
