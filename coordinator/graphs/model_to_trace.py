"""The model whose parts are traced: its own modules, without weights, which are inputs instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from coordinator.graphs.spec import GraphSpec
from coordinator.graphs.tracing import Input, Values
from shared.modeling.skeleton import empty_model

BATCH, LENGTH, ROWS = "batch", "length", "rows"
"""The open sizes of inputs, by name; ranks have names of their own."""

_WEIGHT = "weight."


class ModelToTrace:
    """One model under a run's task: the Hugging Face modules on torch's ``meta`` device."""

    def __init__(self, spec: GraphSpec) -> None:
        """Build the skeleton.

        Raises:
            ModelError: the family is not supported.
        """
        self.spec = spec
        self.architecture = spec.architecture()
        skeleton: Any = empty_model(json.loads(spec.config_json), self.architecture)
        self.skeleton: nn.Module = skeleton.eval().requires_grad_(False)
        self.config = skeleton.config
        # Attention as plain products and a softmax: ONNX has no word for torch's fused one.
        self.config._attn_implementation = "eager"  # noqa: SLF001 - no public setter

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.architecture.hidden_size

    def weight_inputs(self, *paths: str) -> dict[str, Input]:
        """Return an input for each weight of the modules at these paths, by full name."""
        return weight_inputs(
            {
                f"{path}.{name}": parameter
                for path in paths
                for name, parameter in self.skeleton.get_submodule(path).named_parameters()
            }
        )

    def run(
        self, function: Callable[[nn.Module, Values], torch.Tensor], values: Values
    ) -> torch.Tensor:
        """Return ``function`` of the skeleton, whose weights are those among ``values``."""
        return _Whole(self.skeleton, function).with_weights(values)


class _Whole(nn.Module):
    """Runs a function on the whole skeleton, in which some weights are replaced by inputs."""

    def __init__(
        self, skeleton: nn.Module, run: Callable[[nn.Module, Values], torch.Tensor]
    ) -> None:
        super().__init__()
        self.skeleton = skeleton
        self._run = run

    def forward(self, values: Values) -> torch.Tensor:
        return self._run(self.skeleton, values)

    def with_weights(self, values: Values) -> torch.Tensor:
        weights = {f"skeleton.{name}": weight for name, weight in weights_of(values).items()}
        output: torch.Tensor = functional_call(self, weights, (values,), tie_weights=False)
        return output


def weight_inputs(parameters: Mapping[str, torch.Tensor]) -> dict[str, Input]:
    """Return an input for each parameter."""
    return {f"{_WEIGHT}{name}": Input(tuple(p.shape)) for name, p in parameters.items()}


def weights_of(values: Values) -> dict[str, torch.Tensor]:
    """Return the weights among ``values`` by their names in the module."""
    return {
        name[len(_WEIGHT) :]: value for name, value in values.items() if name.startswith(_WEIGHT)
    }


def named_gradients(
    names: Iterable[str], gradients: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return gradients by what they are called as outputs."""
    return {f"gradient.{n}": g for n, g in zip(names, gradients, strict=True)}
