"""LoRA on frozen linear modules: y = base(x) + F_B F_A x + s B A dropout(x).

A and B are trained; F_B F_A is the frozen residual of a hand-back, held as factors (or none).
Adapters and residual are float32 whatever the base's dtype, and a product of an adapter is
cast back to it, as in PEFT. Not PEFT itself: it has no frozen residual and no seeded
dropout, and takes seconds to import on a small device.

Shape suffixes: I input features, O output features (C some of them), R rank, F rank of the
residual, M rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from shared.adapters import Array, HeldAdapters, LoraPair, ModuleAdapter, check_adapter
from shared.errors import ProtocolError

LinearBase: TypeAlias = nn.Linear | Conv1D


class Dropout:
    """The one source of LoRA dropout of a part: off until `begin` gives it a seed."""

    def __init__(self, probability: float) -> None:
        """Drop inputs of A with this probability while a seed is set."""
        self._probability = probability
        self._seed: int | None = None
        self._generator: torch.Generator | None = None

    def begin(self, seed: int | None) -> None:
        """Start the masks of one forward pass; None: no dropout (evaluation)."""
        self._seed = seed
        self._generator = None

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        """Return ``x_MI`` with entries dropped and the rest scaled up to the same mean."""
        if self._seed is None or self._probability == 0.0:
            return x_MI
        if self._generator is None:
            self._generator = torch.Generator(x_MI.device).manual_seed(self._seed)
        keep = 1.0 - self._probability
        mask_MI = torch.empty_like(x_MI).bernoulli_(keep, generator=self._generator)
        return x_MI * mask_MI.div_(keep)


class LoraLinear(nn.Module):
    """A frozen `nn.Linear` or GPT-2 `Conv1D` with an adapter; see the module's formula."""

    def __init__(
        self, base: LinearBase, adapter: ModuleAdapter, *, dropout: Dropout, freeze_a: bool = False
    ) -> None:
        """Wrap ``base``; factors are copied to its device in float32.

        ``freeze_a``: only B is trained.
        """
        super().__init__()
        self.base = base
        self.scaling = adapter.trainable.scaling
        self.a_RI: nn.Parameter | None = None
        self.b_OR: nn.Parameter | None = None
        if adapter.trainable.rank:
            a_RI = _tensor(adapter.trainable.a_RI, base)
            self.a_RI = nn.Parameter(a_RI, requires_grad=not freeze_a)
            self.b_OR = nn.Parameter(_tensor(adapter.trainable.b_OR, base))
        self._dropout = dropout
        self._hold_residual(adapter.frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, O) of (…, I), in the base's dtype."""
        x_MI = x.reshape(-1, x.shape[-1])
        y_MO = functional.linear(x_MI, self._weight_OI, self.base.bias)
        x32_MI = x_MI.float()
        if self._frozen_FI is not None and self._frozen_OF is not None:
            low_MF = functional.linear(x32_MI, self._frozen_FI)
            y_MO = torch.addmm(y_MO.float(), low_MF, self._frozen_OF.t())
        if self.a_RI is not None and self.b_OR is not None:
            low_MR = functional.linear(self._dropout(x32_MI), self.a_RI)
            y_MO = torch.addmm(y_MO.float(), low_MR, self.b_OR.t(), alpha=self.scaling)
        return y_MO.to(x.dtype).view(*x.shape[:-1], y_MO.shape[1])

    def pair(self) -> LoraPair | None:
        """Return a copy of the trainable pair in float32, or None at rank 0."""
        if self.a_RI is None or self.b_OR is None:
            return None
        a_RI, b_OR = (p.detach().cpu().numpy().copy() for p in (self.a_RI, self.b_OR))
        return LoraPair(a_RI, b_OR, self.scaling)

    @torch.no_grad()
    def effective_CI(self, chunk: slice) -> torch.Tensor:
        """Return rows ``chunk`` of base + residual + s B A, in float32."""
        weight_CI = self._weight_OI[chunk].float()
        if self._frozen_FI is not None and self._frozen_OF is not None:
            weight_CI = torch.addmm(weight_CI, self._frozen_OF[chunk], self._frozen_FI)
        if self.a_RI is not None and self.b_OR is not None:
            weight_CI = torch.addmm(weight_CI, self.b_OR[chunk], self.a_RI, alpha=self.scaling)
        return weight_CI

    def _hold_residual(self, frozen: LoraPair | None) -> None:
        """Keep the residual as factors, or in a second weight where that is no larger.

        The base weight itself stays untouched: the next hand-back is on top of it. Below
        float32 a second weight would round the residual away, so there it stays factored.
        """
        weight_OI = _weight_OI(self.base)
        self._weight_OI = weight_OI
        self._frozen_FI: torch.Tensor | None = None
        self._frozen_OF: torch.Tensor | None = None
        if frozen is None or not frozen.rank:
            return
        dense_is_smaller = frozen.rank * sum(weight_OI.shape) >= weight_OI.numel()
        if dense_is_smaller and weight_OI.dtype == torch.float32:
            self._weight_OI = weight_OI + _delta_OI(frozen, self.base)
            return
        self._frozen_FI = _tensor(frozen.a_RI, self.base)
        self._frozen_OF = _tensor(frozen.b_OR, self.base).mul_(frozen.scaling)


class PartAdapters:
    """The adapters in one part of a model, by full module path."""

    def __init__(self, root: nn.Module, *, dropout: float, freeze_a: bool = False) -> None:
        """Start without any adapter in ``root``; ``freeze_a``: of all, only B is trained."""
        self._root = root
        self._freeze_a = freeze_a
        self.dropout = Dropout(dropout)

    def replace(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """Replace the adapters of the named modules; other modules stay as they are.

        With ``fold`` each frozen pair is added to the base weight (in float32, rounded to the
        base's dtype) instead of held. All or nothing: checked before anything changes.

        Raises:
            ProtocolError: a name is no linear module of this part.
            NumericsError: a factor has the wrong shape or is not finite.
        """
        bases = {name: self._base(name) for name in adapters}
        for name, adapter in adapters.items():
            out_features, in_features = _weight_OI(bases[name]).shape
            check_adapter(name, adapter, features=(in_features, out_features))
        for name, adapter in adapters.items():
            base, frozen = bases[name], adapter.frozen
            if fold and frozen is not None:
                _fold(base, frozen)
                frozen = None
            wrapped = LoraLinear(
                base,
                ModuleAdapter(adapter.trainable, frozen),
                dropout=self.dropout,
                freeze_a=self._freeze_a,
            )
            bare = not adapter.trainable.rank and frozen is None
            self._put(name, base if bare else wrapped)

    def read(self) -> dict[str, LoraPair]:
        """Return copies of all trainable pairs, float32, by full module path."""
        pairs = {name: module.pair() for name, module in self._modules()}
        return {name: pair for name, pair in pairs.items() if pair is not None}

    def parameters(self) -> Mapping[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return (A, B) of every module with a rank, by full module path.

        Both are trained, but a frozen A, which asks for no gradient.
        """
        return {
            name: (module.a_RI, module.b_OR)
            for name, module in self._modules()
            if module.a_RI is not None and module.b_OR is not None
        }

    def _modules(self) -> list[tuple[str, LoraLinear]]:
        modules = self._root.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, LoraLinear)]

    def _base(self, name: str) -> LinearBase:
        try:
            module = self._root.get_submodule(name)
        except AttributeError:
            module = None
        module = module.base if isinstance(module, LoraLinear) else module
        if not isinstance(module, nn.Linear | Conv1D):
            raise ProtocolError(f"an adapter came for {name}, which is no linear module held here")
        return module

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._root.get_submodule(parent), leaf, module)


def effective_weight_CI(module: LoraLinear | LinearBase, chunk: slice) -> torch.Tensor:
    """Return rows ``chunk`` of the weight that a module acts with, in float32."""
    if isinstance(module, LoraLinear):
        return module.effective_CI(chunk)
    return _weight_OI(module)[chunk].float()


def _weight_OI(base: LinearBase) -> torch.Tensor:
    """Return the weight as (out, in): GPT-2's Conv1D stores its transpose. Not a copy."""
    weight = base.weight.detach()
    return weight.t() if isinstance(base, Conv1D) else weight


def _tensor(array: Array, base: LinearBase) -> torch.Tensor:
    copied = np.array(array, dtype=np.float32, order="C")
    return torch.from_numpy(copied).to(base.weight.device)


def _delta_OI(pair: LoraPair, base: LinearBase) -> torch.Tensor:
    return (_tensor(pair.b_OR, base) @ _tensor(pair.a_RI, base)).mul_(pair.scaling)


def _fold(base: LinearBase, frozen: LoraPair) -> None:
    # A new tensor: the old one may be a view of a file that other parts read too.
    merged_OI = (_weight_OI(base).float() + _delta_OI(frozen, base)).to(base.weight.dtype)
    merged = merged_OI.t().contiguous() if isinstance(base, Conv1D) else merged_OI
    base.weight = nn.Parameter(merged, requires_grad=False)
