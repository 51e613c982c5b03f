"""The loss of a frozen head, without ever holding all logits at once.

Shape suffixes: M positions with a target, C of them in one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_LOGITS = 1 << 19
"""Logits held at once on a CPU: 2 MiB in float32, what a core's cache still holds."""

CHUNK_LOGITS_ACCELERATOR = 1 << 25
"""The same on an accelerator, where large products matter more: 128 MiB."""


def summed_cross_entropy(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor
) -> torch.Tensor:
    """Return Σ_m -log softmax(W h_m)[target_m], a float64 scalar on the same device.

    ``weight_VD`` is frozen: the gradient of ``hidden_MD`` is all that is ever needed, so it is
    formed chunk by chunk while the chunk's logits exist. Softmax in float32, sum in float64.
    """
    loss: torch.Tensor = _FrozenHead.apply(hidden_MD, weight_VD, targets_M)  # type: ignore[no-untyped-call]
    return loss


class _FrozenHead(torch.autograd.Function):
    """``summed_cross_entropy`` with its gradient: ∂/∂h_m = softmax(W h_m) W - W[target_m]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_M: torch.Tensor,
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=hidden_MD.device)
        wanted = ctx.needs_input_grad[0]
        gradient_MD = torch.empty_like(hidden_MD) if wanted else None
        rows = _chunk_rows(weight_VD)
        for start in range(0, len(hidden_MD), rows):
            chunk = slice(start, start + rows)
            weights_CV, loss_C = _softmax(hidden_MD[chunk], weight_VD, targets_M[chunk])
            loss += loss_C.sum(dtype=torch.float64)
            if gradient_MD is not None:
                own_CD = weight_VD.index_select(0, targets_M[chunk])
                expected_CD = weights_CV.to(weight_VD.dtype) @ weight_VD
                torch.sub(expected_CD, own_CD, out=gradient_MD[chunk])
        ctx.gradient_MD = gradient_MD
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.gradient_MD * outer[0].to(ctx.gradient_MD.dtype), None, None


def _chunk_rows(weight_VD: torch.Tensor) -> int:
    logits = CHUNK_LOGITS if weight_VD.device.type == "cpu" else CHUNK_LOGITS_ACCELERATOR
    return max(16, logits // len(weight_VD))


def _softmax(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, targets_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax (C, V) and each position's loss (C,), both float32.

    In place on the one logits tensor, with one exponential per logit.
    """
    logits_CV = (hidden_CD @ weight_VD.t()).float()
    logits_CV -= logits_CV.amax(dim=1, keepdim=True)
    own_C = logits_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
    sums_C = logits_CV.exp_().sum(dim=1)
    loss_C = sums_C.log() - own_C
    return logits_CV.div_(sums_C.unsqueeze(1)), loss_C
