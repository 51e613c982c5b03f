"""What each side of a simulated run holds right after every hand-back, seen from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from coordinator.aggregation import SERVER
from coordinator.server_training import ServerTrainer
from edge_agent.backends.torch_backend import TorchBackend
from shared.adapters import Array, HeldAdapters
from shared.modeling.lora import LoraLinear
from shared.modeling.splitting import ModelPart
from tests.support.simulation import Simulation


@dataclass(frozen=True)
class Held:
    """One holder after the hand-back that began ``round``.

    ``received``: what it was handed; ``weights``: the effective weight (out, in) of every
    linear module of its blocks, trained or not.
    """

    holder: str
    round: int
    received: HeldAdapters
    weights: Mapping[str, Array]


def watch_hand_backs(monkeypatch: pytest.MonkeyPatch, sim: Simulation) -> list[Held]:
    """Return a list that grows with every hand-back to a device or to the server."""
    seen: list[Held] = []

    def spy_on(kind: type[Any], part_name: str) -> None:
        original = kind.set_adapters

        def spied(self: Any, adapters: HeldAdapters, *, fold: bool) -> None:
            original(self, adapters, fold=fold)
            holder = str(self._device_id) if kind is TorchBackend else SERVER
            weights = effective_weights(getattr(self, part_name))
            seen.append(Held(holder, sim.coordinator._next_round, adapters, weights))

        monkeypatch.setattr(kind, "set_adapters", spied)

    spy_on(TorchBackend, "_front")
    spy_on(ServerTrainer, "_back")
    return seen


def effective_weights(part: ModelPart) -> dict[str, Array]:
    """Return W of y = W x + b for every linear module of the part's blocks, as it computes."""
    part.adapters.dropout.begin(None)
    architecture = part.architecture
    modules = [
        f"{architecture.block_path(b)}.{m}" for b in part.blocks for m in architecture.linears
    ]
    return {
        module: _weight_of(part.skeleton.get_submodule(module), architecture.features(module)[0])
        for module in modules
    }


def _weight_of(module: torch.nn.Module, in_features: int) -> Array:
    base = module.base if isinstance(module, LoraLinear) else module
    with torch.no_grad():
        weight_IO = module(torch.eye(in_features))
        weight_IO = weight_IO - base.bias if base.bias is not None else weight_IO
    weight: Array = weight_IO.t().double().numpy()
    return weight
