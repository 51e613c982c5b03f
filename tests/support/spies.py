"""What each side of a simulated run holds right after every hand-back, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.aggregation import SERVER
from coordinator.server_training import ServerTrainer
from edge_agent.backends.onnx_backend import OnnxBackend
from edge_agent.backends.onnx_front import OnnxFront
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

    def spy_on(kind: type[Any], part_of: Callable[[Any], tuple[str, Mapping[str, Array]]]) -> None:
        original = kind.set_adapters

        def spied(self: Any, adapters: HeldAdapters, *, fold: bool) -> None:
            original(self, adapters, fold=fold)
            holder, weights = part_of(self)
            seen.append(Held(holder, sim.coordinator._next_round, adapters, weights))

        monkeypatch.setattr(kind, "set_adapters", spied)

    spy_on(TorchBackend, lambda one: (str(one._device_id), effective_weights(one._front)))
    spy_on(OnnxBackend, lambda one: (str(one._part.device_id), _weights_in_graphs(one._part.front)))
    spy_on(ServerTrainer, lambda one: (SERVER, effective_weights(one._back)))
    return seen


def _weights_in_graphs(front: OnnxFront) -> dict[str, Array]:
    """Return W of y = W x + b for every linear module that graphs adapt, of what they are given.

    Of the inputs of the next run, not of what they were made of.
    """
    weights = {}
    for name in front._modules:
        block, inside = front._place(name)
        given = {
            part: front._held[block][f"{part}.{inside}"].numpy().astype(np.float64)
            for part in ("a", "b", "scaling", "frozen_a", "frozen_b")
        }
        base = front._held[block][f"weight.{inside}.weight"].numpy().astype(np.float64)
        scale = front._held[block].get(f"scale.{inside}.weight")
        base = base if scale is None else base * scale.numpy()
        base_OI = base.T if front._architecture.family.inputs_first else base
        weights[name] = (
            base_OI
            + given["scaling"] * (given["b"] @ given["a"])
            + given["frozen_b"] @ given["frozen_a"]
        )
    return weights


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
