"""How much each weight matrix matters to the loss: Σ_j |w_j ∂L/∂w_j|, without keeping ∂L/∂W.

The base is frozen, so nobody forms ∂L/∂W in training. For a probe it is ∂L/∂W = ∂Yᵀ X of the
matrix's own inputs X and the gradient ∂Y of its outputs: formed inside the backward pass, for
a few rows at a time, multiplied with the weights, reduced to one number, and dropped.

``w`` is the effective weight: base + frozen residual + s B A. Paper: arXiv:2505.02795
(HSplitLoRA), important weight identification; the absolute value is *ours* (ALGORITHMS).

Shape suffixes: I input features, O output features, C a few of these, M rows, R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.errors import NumericsError, ProtocolError
from shared.modeling.lora import LinearBase, LoraLinear, effective_weight_CI

CHUNK_WEIGHTS = 1 << 22
"""Entries of ∂L/∂W held at once: 16 MiB in float32, twice that with the weights beside them."""


class WatchedForward:
    """One micro-batch's way through the candidates, to be carried back by `backward`.

    Candidates that the micro-batch did not pass through are not in the result. Several may
    be open at once: what each needs hangs on its own graph.
    """

    def __init__(self, source: torch.Tensor) -> None:
        """Watch what starts from ``source``; see `watching`."""
        self._source = source
        self._sums: dict[str, torch.Tensor] = {}

    def backward(
        self, output: torch.Tensor, outer: torch.Tensor | None, *, what: str
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Carry the gradient ``outer`` of ``output`` (None: a scalar's 1) back to the source.

        Nothing is accumulated in any parameter. May be called once.

        Returns:
            The gradient of the source, and Σ_j |w_j ∂L/∂w_j| by candidate.

        Raises:
            NumericsError: a sum is not finite; ``what`` names the micro-batch.
        """
        (gradient,) = torch.autograd.grad(output, self._source, outer)
        sums = {name: float(value) for name, value in self._sums.items()}
        bad = sorted(name for name, value in sums.items() if not math.isfinite(value))
        if bad:
            raise NumericsError(f"{what}: the importance of {bad[0]} is not finite")
        return gradient, sums

    def hook(self, name: str, module: LoraLinear | LinearBase) -> Callable[..., None]:
        """Return the forward hook of one candidate."""

        def after_forward(_: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            x = inputs[0].detach()

            def with_gradient(y_gradient: torch.Tensor) -> None:
                self._sums[name] = _importance(module, x, y_gradient)

            y.register_hook(with_gradient)

        return after_forward


@contextlib.contextmanager
def watching(
    root: nn.Module, modules: Iterable[str], *, source: torch.Tensor
) -> Iterator[WatchedForward]:
    """Watch one forward pass from ``source`` through linear modules, by their paths in ``root``.

    ``source``: a tensor without a history; from now on it requires a gradient. LoRA dropout
    must be off, or what is measured is not the weight that acts.

    Raises:
        ProtocolError: a name is no linear module of ``root``.
    """
    watched = WatchedForward(source.requires_grad_())
    with torch.enable_grad(), contextlib.ExitStack() as hooks:
        for name in modules:
            module = linear_module(root, name)
            handle = module.register_forward_hook(watched.hook(name, module))
            hooks.callback(handle.remove)
        yield watched


def linear_module(root: nn.Module, name: str) -> LoraLinear | LinearBase:
    """Return the module that acts under this path: with its adapter where it has one.

    Raises:
        ProtocolError: there is none, or it is not linear.
    """
    try:
        module: nn.Module | None = root.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, LoraLinear | nn.Linear | Conv1D):
        raise ProtocolError(f"{name} is no linear module held here: it has no importance")
    return module


def _importance(
    module: LoraLinear | LinearBase, x: torch.Tensor, y_gradient: torch.Tensor
) -> torch.Tensor:
    """Return Σ |W ∘ (∂Yᵀ X)| as a float64 scalar; products in float32, the sum in float64.

    Rows of padding add nothing: no loss depends on them, so their ∂Y is zero.
    """
    x_MI = x.reshape(-1, x.shape[-1]).float()
    y_gradient_MO = y_gradient.reshape(-1, y_gradient.shape[-1]).float()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    rows = max(1, CHUNK_WEIGHTS // x_MI.shape[1])
    for start in range(0, y_gradient_MO.shape[1], rows):
        chunk = slice(start, start + rows)
        product_CI = y_gradient_MO[:, chunk].t() @ x_MI
        product_CI *= effective_weight_CI(module, chunk)
        total += product_CI.abs_().sum(dtype=torch.float64)
    return total
