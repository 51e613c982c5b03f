"""The ranks of a device's modules, by its terms and the weights' importance. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from coordinator.planning.adapter_sizes import LoraKey, lora_key
from coordinator.planning.conditions import Conditions
from coordinator.planning.device_plan import adapted
from coordinator.planning.rank_policy import ranks_by_importance
from shared.terms import LoraTerms

Ranks: TypeAlias = tuple[Mapping[str, int], Mapping[str, float]]
"""Rank and scaling by full module path."""


class RankBook:
    """Ranks by what decides them: a fleet of thousands has few different terms."""

    def __init__(self, conditions: Conditions, importance: Mapping[str, float]) -> None:
        """Take the scores; without any, or with `ranks: uniform`, the terms alone decide."""
        self._conditions = conditions
        self._importance = importance if conditions.ranks == "importance" else {}
        self._known: dict[tuple[LoraKey, range, float], Ranks] = {}

    def of(self, lora: LoraTerms, blocks: range, *, share: float = 1.0) -> Ranks:
        """Return the ranks and scalings of a device that holds ``blocks``.

        Its terms say how many adapter parameters it has (``share`` of them where its memory holds
        no more), its modules' importance where they go. The scaling of a module stays alpha / rank
        of the *terms*, whatever rank it gets (*ours*): so moving rank about does not move the
        learning rate of anything.
        """
        key = lora_key(lora), blocks, share
        if key not in self._known:
            self._known[key] = self._assign(lora, blocks, share)
        return self._known[key]

    def _assign(self, lora: LoraTerms, blocks: range, share: float) -> Ranks:
        ranks, scalings = adapted(lora, self._conditions.architecture, blocks)
        if any(self._importance.get(module, 0.0) > 0 for module in ranks):
            ranks = self._by_importance(ranks, share)
        elif share < 1:
            ranks = {module: max(1, int(rank * share)) for module, rank in ranks.items()}
        return ranks, {module: scalings[module] for module in ranks}

    def _by_importance(self, ranks: Mapping[str, int], share: float) -> dict[str, int]:
        features = {module: self._conditions.architecture.features(module) for module in ranks}
        budget = sum(rank * sum(features[module]) for module, rank in ranks.items())
        found = ranks_by_importance(
            self._importance, features, budget_parameters=int(budget * share)
        )
        return {module: rank for module, rank in found.items() if rank}
