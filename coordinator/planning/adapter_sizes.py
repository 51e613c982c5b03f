"""How large the adapters in the first k blocks are, by k: trained ones and residual. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.device_plan import adapted
from shared.architecture import Features
from shared.terms import LoraTerms

Array: TypeAlias = npt.NDArray[np.float64]
LoraKey: TypeAlias = tuple[object, ...]

RESIDUAL_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False)
class AdapterSizes:
    """``parameters`` and ``residual_bytes`` (L + 1,): of blocks 0 … k-1, by k."""

    parameters: Array
    residual_bytes: Array

    @property
    def rest(self) -> AdapterSizes:
        """The same of blocks k … L-1."""
        parameters, residual = self.parameters, self.residual_bytes
        return AdapterSizes(parameters[-1] - parameters, residual[-1] - residual)


def lora_key(lora: LoraTerms) -> LoraKey:
    """Return what two equal `LoraTerms` have in common: something that can be hashed."""
    patterns = (tuple(lora.rank_pattern.items()), tuple(lora.alpha_pattern.items()))
    return lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules, *patterns


def residual_growth(devices: Sequence[FleetDevice], conditions: Conditions) -> int:
    """Return the highest rank that the frozen `residual` of a module can reach in this run.

    Each aggregation adds at most the ranks of all who trained the module, the server included.
    """
    if conditions.hand_back != "residual":
        return 0
    every = [*(device.terms.lora for device in devices), conditions.server_lora]
    return conditions.rounds * sum(max((lora.r, *lora.rank_pattern.values())) for lora in every)


class SizeBook:
    """Sizes by what decides them: a fleet of thousands has few different terms."""

    def __init__(self, conditions: Conditions, *, growth: int) -> None:
        """Start empty; ``growth`` as of `residual_growth`."""
        self._conditions = conditions
        self._growth = growth
        self._known: dict[LoraKey, AdapterSizes] = {}

    def of(self, lora: LoraTerms) -> AdapterSizes:
        """Return the sizes that these terms mean."""
        key = lora_key(lora)
        if key not in self._known:
            self._known[key] = _sizes(lora, self._conditions, growth=self._growth)
        return self._known[key]


def _sizes(lora: LoraTerms, conditions: Conditions, *, growth: int) -> AdapterSizes:
    architecture = conditions.architecture
    blocks = architecture.block_count
    parameters, residual = np.zeros(blocks + 1), np.zeros(blocks + 1)
    ranks, _ = adapted(lora, architecture, range(blocks))
    dense_allowed = conditions.training.dtype == "float32"
    for module, rank in ranks.items():
        after = architecture.block_of(module) + 1
        features = architecture.features(module)
        parameters[after] += rank * sum(features)
        residual[after] += _residual_bytes(features, growth, dense_allowed=dense_allowed)
    return AdapterSizes(np.cumsum(parameters), np.cumsum(residual))


def _residual_bytes(features: Features, growth: int, *, dense_allowed: bool) -> int:
    """Return what `shared.modeling.lora` holds of a residual: factors, or a second weight."""
    factors = min(growth, *features) * sum(features)
    held = min(factors, features[0] * features[1]) if dense_allowed else factors
    return RESIDUAL_ITEM_BYTES * held
