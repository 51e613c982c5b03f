"""The optimizer of what one side trains: torch's own, with the run's schedule and hand-backs.

What a step decides, `shared.optimizer_step` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from shared.errors import StorageError
from shared.optimizer_step import StepCounts, check_target_tokens, gradient_scale
from shared.terms import OptimizerTerms

Factors: TypeAlias = tuple[nn.Parameter, ...]
"""The trainable A and B of one module, or one weight of a classifier."""
OptimizerState: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""What a checkpoint keeps: ``<module>|a|exp_avg`` and such → array."""


class AdapterOptimizer:
    """AdamW or SGD over the adapters of one side. Not thread-safe."""

    def __init__(self, terms: OptimizerTerms, *, total_steps: int) -> None:
        """Start with nothing to optimise; see `follow`."""
        self._terms = terms
        self._counts = StepCounts(terms, total_steps=total_steps)
        self._factors: dict[str, Factors] = {}
        self._torch: torch.optim.Optimizer | None = None

    def follow(self, factors: Mapping[str, Factors]) -> None:
        """Optimise these modules from now on.

        A module whose parameters are the same objects as before keeps its moments and count;
        all others start fresh, and modules no longer named are forgotten.
        """
        kept = {n for n, pair in factors.items() if _same(pair, self._factors.get(n))}
        self._counts.follow(factors, kept=kept)
        old_state = self._torch.state if self._torch is not None else {}
        self._factors = dict(factors)
        self._torch = self._build() if factors else None
        if self._torch is not None:
            parameters = [p for n in kept for p in factors[n] if p in old_state]
            self._torch.state.update({p: old_state[p] for p in parameters})

    def step(self, step: int, *, denominator: int) -> float:
        """Divide the gradients by ``denominator``, clip them, take global step ``step``.

        Modules without a gradient are left alone, moments included. Gradients are consumed.

        Returns:
            The norm of all gradients after the division and before clipping.

        Raises:
            NumericsError: nothing to divide by, or a gradient is not finite: the gradients are
                gone, all else is as before.
        """
        try:
            return self._step(step, denominator)
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters():
            parameter.grad = None

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of moments and counts, for safetensors."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, pair in self._factors.items():
            arrays[f"{name}|counts"] = np.array(self._counts.of(name), dtype=np.int64)
            for letter, parameter in zip("ab", pair, strict=False):
                for key, value in self._state_of(parameter).items():
                    if isinstance(value, torch.Tensor):
                        arrays[f"{name}|{letter}|{key}"] = value.detach().cpu().numpy().copy()
        return arrays

    def restore(self, state: OptimizerState) -> None:
        """Continue from a saved state of the same modules at the same ranks.

        Raises:
            StorageError: the state is of other modules or ranks.
        """
        if {key.partition("|")[0] for key in state} != set(self._factors):
            raise StorageError("the optimizer state is of other modules than the adapters")
        for name, pair in self._factors.items():
            steps, from_the_start = state[f"{name}|counts"].tolist()
            self._counts.restore(name, since_fresh=steps, from_the_start=bool(from_the_start))
            for letter, parameter in zip("ab", pair, strict=False):
                self._restore(f"{name}|{letter}|", parameter, state)
        self.follow(self._factors)

    def _step(self, step: int, denominator: int) -> float:
        check_target_tokens(denominator, step=step)
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if self._torch is None or not gradients:
            return 0.0
        norm, scale = gradient_scale(
            float(get_total_norm(gradients, foreach=True)),
            denominator=denominator,
            step=step,
            max_grad_norm=self._terms.max_grad_norm,
        )
        for gradient in gradients:
            gradient.mul_(scale)
        rates = self._counts.take(step)
        for group in self._torch.param_groups:
            group["lr"] = rates[group["modules"][0]]
        self._torch.step()
        return norm

    def _restore(self, prefix: str, parameter: nn.Parameter, state: OptimizerState) -> None:
        tensors = {
            key.removeprefix(prefix): torch.from_numpy(np.array(array)).to(parameter.device)
            for key, array in state.items()
            if key.startswith(prefix)
        }
        for key, tensor in tensors.items():
            if tensor.ndim and tensor.shape != parameter.shape:
                raise StorageError(f"optimizer state {prefix}{key} has shape {tensor.shape}")
        if self._torch is not None:
            self._torch.state.pop(parameter, None)
            self._torch.state.update({parameter: tensors} if tensors else {})

    def _build(self) -> torch.optim.Optimizer:
        """Return torch's optimizer with one group per count, as each has its own rate."""
        options = [
            {"params": [p for name in names for p in self._factors[name]], "modules": names}
            for names in self._counts.groups()
        ]
        terms = self._terms
        # Fused: one call for all of a group's small factors, on CPU as on CUDA.
        if terms.name == "sgd":
            return torch.optim.SGD(
                options, lr=terms.learning_rate, weight_decay=terms.weight_decay, fused=True
            )
        return torch.optim.AdamW(
            options,
            lr=terms.learning_rate,
            betas=(terms.beta1, terms.beta2),
            eps=terms.epsilon,
            weight_decay=terms.weight_decay,
            fused=True,
        )

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self._factors.values() for parameter in pair]

    def _state_of(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        state: Mapping[str, Any] = {}
        return self._torch.state.get(parameter, state) if self._torch is not None else state


def _same(new: Factors, old: Factors | None) -> bool:
    return old is not None and all(a is b for a, b in zip(new, old, strict=True))
