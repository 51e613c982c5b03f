"""The optimizer of a device's adapters in numpy: `shared.modeling.optimizer` without torch.

AdamW (arXiv:1711.05101) of a parameter p with gradient g, at its t-th gradient and rate η:

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    p ← (1 − η λ) p − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

Held are M = m / (1 − β₁) and V = v / (1 − β₂), which saves a pass over memory for each:

    M ← β₁ M + g                 V ← β₂ V + g²
    p ← (1 − η λ) p − η c₁ / c₂ · M / (√V + ε / c₂)
    c₁ = (1 − β₁) / (1 − β₁ᵗ),   c₂ = √((1 − β₂) / (1 − β₂ᵗ))

All in float32, as torch; η, c₁ and c₂ in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import NumericsError, ProtocolError
from shared.optimizer_step import StepCounts, check_target_tokens, gradient_scale
from shared.terms import OptimizerTerms

Array32: TypeAlias = npt.NDArray[np.float32]
Trained: TypeAlias = tuple[Array32, ...]
"""What is trained of one module: A and B, B alone where A is frozen, or one weight."""

_CHUNK = 32_768
"""Items updated at a time: 512 kB of parameter, gradient and moments stay in a core's cache."""


class NumpyOptimizer:
    """AdamW or SGD over the adapters of a device, in place. Not thread-safe."""

    def __init__(self, terms: OptimizerTerms, *, total_steps: int) -> None:
        """Start with nothing to optimise; see `follow`."""
        self._terms = terms
        self._counts = StepCounts(terms, total_steps=total_steps)
        self._modules: dict[str, _Module] = {}

    def follow(self, parameters: Mapping[str, Trained]) -> None:
        """Optimise these arrays from now on, in place: float32 and C-contiguous.

        A module whose arrays are the same objects as before keeps moments, count and gradients;
        all others start fresh, and modules no longer named are forgotten.

        Raises:
            ValueError: an array cannot be updated in place.
        """
        for name, arrays in parameters.items():
            _check_in_place(name, arrays)
        old = self._modules
        kept = {n for n, arrays in parameters.items() if n in old and old[n].is_of(arrays)}
        self._counts.follow(parameters, kept=kept)
        self._modules = {
            name: old[name] if name in kept else _Module(arrays, moments=self._moments)
            for name, arrays in parameters.items()
        }

    def accumulate(self, name: str, gradients: Trained) -> None:
        """Add to the sum of a module's gradients: one for each of its arrays.

        The optimizer owns them from now on, and writes into them.

        Raises:
            ProtocolError: no such module is followed.
            NumericsError: they have other shapes than the module's arrays.
        """
        if name not in self._modules:
            raise ProtocolError(f"gradients came for {name}, which is not trained here")
        self._modules[name].accumulate(gradients, what=f"gradients of {name}")

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
            # As torch: what overflows becomes infinity without a word.
            with np.errstate(over="ignore", invalid="ignore"):
                return self._step(step, denominator)
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget all gradients."""
        for module in self._modules.values():
            module.gradients = ()

    def _step(self, step: int, denominator: int) -> float:
        check_target_tokens(denominator, step=step)
        moving = {name: module for name, module in self._modules.items() if module.gradients}
        if not moving:
            return 0.0
        norm, scale = gradient_scale(
            _total_norm([g for module in moving.values() for g in module.gradients]),
            denominator=denominator,
            step=step,
            max_grad_norm=self._terms.max_grad_norm,
        )
        rates = self._counts.take(step)
        for name, module in moving.items():
            module.updates += 1
            self._update(module, rate=rates[name], scale=scale)
        return norm

    @property
    def _moments(self) -> int:
        return 2 if self._terms.name == "adamw" else 0

    def _update(self, module: _Module, *, rate: float, scale: float) -> None:
        if self._terms.name == "sgd":
            for p, g in module.chunks():
                _sgd(p, g, rate=rate, scale=scale, weight_decay=self._terms.weight_decay)
            return
        adamw = _AdamW(self._terms, rate=rate, scale=scale, updates=module.updates)
        for p, g, first, second in module.chunks():
            adamw.update(p, g, first=first, second=second)


class _Module:
    """One module's arrays with all that the optimizer keeps of them, flat."""

    def __init__(self, arrays: Trained, *, moments: int) -> None:
        self._arrays = arrays
        self._flat = tuple(array.reshape(-1) for array in arrays)
        self._moments = tuple(
            tuple(np.zeros_like(flat) for _ in range(moments)) for flat in self._flat
        )
        self.gradients: Trained = ()
        self.updates = 0

    def is_of(self, arrays: Trained) -> bool:
        """Say whether these are the same objects."""
        return len(arrays) == len(self._arrays) and all(map(_is, arrays, self._arrays))

    def accumulate(self, gradients: Trained, *, what: str) -> None:
        """Take the first gradients over, add later ones to them."""
        shapes, expected = [g.shape for g in gradients], [a.shape for a in self._arrays]
        if shapes != expected:
            raise NumericsError(f"{what}: expected shapes {expected}, got {shapes}")
        if not self.gradients:
            usable = (np.require(g, np.float32, ["C", "WRITEABLE"]) for g in gradients)
            self.gradients = tuple(gradient.reshape(-1) for gradient in usable)
            return
        with np.errstate(over="ignore", invalid="ignore"):
            for sums, gradient in zip(self.gradients, gradients, strict=True):
                np.add(sums, gradient.reshape(-1), out=sums)

    def chunks(self) -> Iterator[Trained]:
        """Yield each parameter with its gradient and moments, a few cached items at a time."""
        for flat, gradient, moments in zip(self._flat, self.gradients, self._moments, strict=True):
            for start in range(0, flat.size, _CHUNK):
                part = slice(start, start + _CHUNK)
                yield (flat[part], gradient[part], *(moment[part] for moment in moments))


class _AdamW:
    """The coefficients of one update of one module; see the formula above."""

    def __init__(self, terms: OptimizerTerms, *, rate: float, scale: float, updates: int) -> None:
        c1 = (1.0 - terms.beta1) / (1.0 - terms.beta1**updates)
        c2 = math.sqrt((1.0 - terms.beta2) / (1.0 - terms.beta2**updates))
        self._scale = scale
        self._beta1, self._beta2 = terms.beta1, terms.beta2
        self._epsilon = terms.epsilon / c2
        self._rate = rate * c1 / c2
        self._decay = 1.0 - rate * terms.weight_decay

    def update(self, p: Array32, g: Array32, *, first: Array32, second: Array32) -> None:
        """Update one parameter and its moments; ``g`` serves as scratch."""
        g *= self._scale
        first *= self._beta1
        first += g
        np.square(g, out=g)
        second *= self._beta2
        second += g
        np.sqrt(second, out=g)
        g += self._epsilon
        np.divide(first, g, out=g)
        g *= self._rate
        p *= self._decay
        p -= g


def _sgd(p: Array32, g: Array32, *, rate: float, scale: float, weight_decay: float) -> None:
    """Take one step p ← p − η (g + λ p); ``g`` serves as scratch."""
    g *= scale
    if weight_decay:
        g += weight_decay * p
    g *= rate
    p -= g


def _total_norm(gradients: list[Array32]) -> float:
    """Return the norm of all of them together, in float32: sums of chunks, then of those."""
    chunks = (g[start : start + _CHUNK] for g in gradients for start in range(0, g.size, _CHUNK))
    squares = np.array([np.dot(chunk, chunk) for chunk in chunks], dtype=np.float32)
    return float(np.sqrt(squares.sum()))


def _check_in_place(name: str, arrays: Trained) -> None:
    for array in arrays:
        flags = array.flags
        if array.dtype != np.float32 or not (flags.c_contiguous and flags.writeable):
            raise ValueError(f"{name}: {array.dtype}{list(array.shape)} is not updated in place")


def _is(one: object, other: object) -> bool:
    return one is other
