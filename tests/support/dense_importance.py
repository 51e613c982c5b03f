"""Σ |w ∂L/∂w| the plain way: a whole Hugging Face model whose weights all have gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from edge_agent.backends.base import TokenBatch
from shared.adapters import HeldAdapters
from tests.support.monolithic import summed_loss
from tests.support.tiny_models import TinyModel


def dense_importance(
    model: TinyModel, adapters: HeldAdapters, batches: Iterable[TokenBatch]
) -> dict[str, float]:
    """Return, by path of each linear module in a block, the sum over micro-batches.

    ``adapters`` (with their residuals) are added to the weights first.
    """
    whole = model.hugging_face()
    for name, adapter in adapters.items():
        weight = whole.get_submodule(name).weight
        for pair in (adapter.trainable, adapter.frozen):
            if pair is not None:
                delta_OI = torch.from_numpy(pair.delta_OI()).float()
                is_gpt2 = model.config["model_type"] == "gpt2"
                weight.data += delta_OI.t() if is_gpt2 else delta_OI
    architecture = model.architecture
    names = [
        f"{architecture.block_path(block)}.{inside}"
        for block in range(architecture.block_count)
        for inside in architecture.linears
    ]
    sums = dict.fromkeys(names, 0.0)
    for batch in batches:
        whole.zero_grad()
        summed_loss(whole, batch).backward()
        for name in names:
            weight = whole.get_submodule(name).weight
            sums[name] += float((weight.detach() * weight.grad).double().abs().sum())
    return sums
