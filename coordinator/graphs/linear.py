"""A linear module with LoRA whose backward pass is written out, for tracing.

y = x W + b + s (m ∘ x) Aᵀ Bᵀ + x F_Aᵀ F_Bᵀ with a mask m of dropout, see
`shared.modeling.lora`. Written out, because autograd would compute gradients of the frozen
residual's factors too, and because what comes in and out of each module has to be known by name:
it is where the backward graph is cut off the forward graph.

With W = q s in 8 bits, x W is (x q) s and ∂y Wᵀ is (∂y s) qᵀ: to onnxruntime, scaling rows comes
cheaper than scaling weights, and both than its DequantizeLinear. q is widened where it is used,
and what it is widened to is not kept.

Shape suffixes: M rows, I input features, O output features, R rank, F rank of the residual,
L = R + F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.modeling.lora import LinearBase


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The inputs of one adapted module; ``mask_MI`` None: there is no dropout."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: torch.Tensor
    frozen_a_FI: torch.Tensor
    frozen_b_OF: torch.Tensor
    mask_MI: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class Record:
    """What passed through the modules of one block while it was traced, by module."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    output_gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class Adapters:
    """The adapters and the record of the trace that runs now; modules look here for theirs."""

    def __init__(self) -> None:
        """Start without any."""
        self._of: Mapping[str, Adapter] = {}
        self._scales: Mapping[str, torch.Tensor] = {}
        self.record = Record()

    def begin(self, adapters: Mapping[str, Adapter], scales: Mapping[str, torch.Tensor]) -> Record:
        """Take the adapters and the scales of weights in 8 bits; return an empty record."""
        self._of, self._scales, self.record = adapters, scales, Record()
        return self.record

    def scale(self, name: str) -> torch.Tensor | None:
        """Return the scale of a module's weight, (1, O); None: the weight is no product."""
        scale = self._scales.get(name)
        return None if scale is None else scale.reshape(1, -1)

    def get(self, name: str) -> Adapter | None:
        """Return a module's adapter; None: it has none."""
        return self._of.get(name)

    def __deepcopy__(self, _: Any) -> Adapters:
        """Stay the same where the modules are copied for export."""
        return self


class TracedLinear(nn.Module):
    """Stands for a frozen `nn.Linear` or `Conv1D`, under the same names of weights."""

    def __init__(self, base: LinearBase, name: str, adapters: Adapters) -> None:
        """Take the place of ``base``; ``name``: its path inside the block."""
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._transposed = isinstance(base, Conv1D)
        self._name = name
        self._adapters = adapters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, O) of (…, I)."""
        x_MI = x.reshape(-1, x.shape[-1])
        weight_IO = self.weight if self._transposed else self.weight.t()
        adapter, record = self._adapters.get(self._name), self._adapters.record
        a_RI, b_OR = (None, None) if adapter is None else (adapter.a_RI, adapter.b_OR)
        scale_1O = self._adapters.scale(self._name)
        fixed = _Fixed(self._name, weight_IO, scale_1O, self.bias, adapter, record)
        y_MO: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x_MI, a_RI, b_OR, fixed
        )
        return y_MO.view(*x.shape[:-1], y_MO.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class _Fixed:
    """What a module has that no gradient is wanted of."""

    name: str
    weight_IO: torch.Tensor
    scale_1O: torch.Tensor | None
    bias_O: torch.Tensor | None
    adapter: Adapter | None
    record: Record

    def times_weight(self, x_MI: torch.Tensor) -> torch.Tensor:
        """Return x W."""
        if self.scale_1O is None:
            return x_MI @ self.weight_IO
        return (x_MI @ self.weight_IO.float()) * self.scale_1O

    def times_weight_transposed(self, dy_MO: torch.Tensor) -> torch.Tensor:
        """Return ∂y Wᵀ."""
        if self.scale_1O is None:
            return dy_MO @ self.weight_IO.t()
        return (dy_MO * self.scale_1O) @ self.weight_IO.float().t()


class _Linear(torch.autograd.Function):
    """The formula of this module's docstring, and its gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: torch.Tensor,
        a_RI: torch.Tensor | None,
        b_OR: torch.Tensor | None,
        fixed: _Fixed,
    ) -> torch.Tensor:
        y_MO = fixed.times_weight(x_MI)
        y_MO = y_MO if fixed.bias_O is None else y_MO + fixed.bias_O
        adapter, low_MR = fixed.adapter, None
        if adapter is not None and a_RI is not None and b_OR is not None:
            low_MR = _dropped(x_MI, adapter) @ a_RI.t() * adapter.scaling
            low_ML = torch.cat([low_MR, x_MI @ adapter.frozen_a_FI.t()], dim=1)
            y_MO = y_MO + low_ML @ torch.cat([b_OR, adapter.frozen_b_OF], dim=1).t()
        ctx.fixed, ctx.x_MI, ctx.low_MR = fixed, x_MI, low_MR
        fixed.record.outputs[fixed.name] = y_MO
        return y_MO

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy_MO,) = outer
        fixed, x_MI, adapter = ctx.fixed, ctx.x_MI, ctx.fixed.adapter
        fixed.record.inputs[fixed.name] = x_MI
        fixed.record.output_gradients[fixed.name] = dy_MO
        dx_MI = fixed.times_weight_transposed(dy_MO)
        if adapter is None:
            return dx_MI, None, None, None
        rank = adapter.a_RI.shape[0]
        dlow_ML = dy_MO @ torch.cat([adapter.b_OR, adapter.frozen_b_OF], dim=1)
        dlow_MR = dlow_ML[:, :rank] * adapter.scaling
        da_RI = dlow_MR.t() @ _dropped(x_MI, adapter)
        db_OR = dy_MO.t() @ ctx.low_MR
        dlow_MF = dlow_ML[:, rank:]
        if adapter.mask_MI is None:
            factors_LI = torch.cat([adapter.a_RI, adapter.frozen_a_FI])
            return dx_MI + torch.cat([dlow_MR, dlow_MF], dim=1) @ factors_LI, da_RI, db_OR, None
        dx_MI = dx_MI + dlow_MF @ adapter.frozen_a_FI
        return dx_MI + dlow_MR @ adapter.a_RI * adapter.mask_MI, da_RI, db_OR, None


def _dropped(x_MI: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    return x_MI if adapter.mask_MI is None else x_MI * adapter.mask_MI
