"""The yardstick: an ordinary PEFT training loop on the whole Hugging Face model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from edge_agent.backends.base import NO_TARGET, TokenBatch
from shared.adapters import AdapterState, LoraPair
from shared.terms import LoraTerms, OptimizerTerms
from tests.support.tiny_models import TinyModel, fresh_adapters


@dataclass(frozen=True)
class Trained:
    """Summed loss of each step, and every pair after the last, by module."""

    losses: tuple[float, ...]
    adapters: dict[str, LoraPair]


def train_whole(
    model: TinyModel,
    batches: Sequence[TokenBatch],
    *,
    lora: LoraTerms,
    optimizer: OptimizerTerms,
    clip_at: int | None = None,
    start: AdapterState | None = None,
) -> Trained:
    """Train one step per batch with PEFT, starting from ``start``, rate falling linearly.

    ``start``: None for `fresh_adapters`. With ``clip_at`` the adapters below that block and
    those from it on are clipped apart.
    """
    peft_model = _peft_model(model, lora)
    if start is None:
        blocks = range(model.architecture.block_count)
        fresh = fresh_adapters(model.architecture, lora, blocks=blocks)
        start = {name: adapter.trainable for name, adapter in fresh.items()}
    parameters = _copy_in(peft_model, start)
    chosen = _torch_optimizer([p for pair in parameters.values() for p in pair], optimizer)
    steps = len(batches)
    rates = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 - step / steps)
    losses = []
    for batch in batches:
        loss = summed_loss(peft_model, batch)
        (loss / batch.target_tokens).backward()
        if clip_at is not None:
            for below in (True, False):
                side = [
                    p
                    for name, pair in parameters.items()
                    for p in pair
                    if (model.architecture.block_of(name) < clip_at) == below
                ]
                torch.nn.utils.clip_grad_norm_(side, optimizer.max_grad_norm)
        chosen.step()
        rates.step()
        chosen.zero_grad()
        losses.append(float(loss.detach()))
    return Trained(tuple(losses), _copy_out(parameters, lora))


def _peft_model(model: TinyModel, lora: LoraTerms) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own deprecations are not ours to mend
        import peft

        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules=list(lora.target_modules) or None,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            fan_in_fan_out=model.config["model_type"] == "gpt2",
            task_type="CAUSAL_LM",
        )
        # eval: the base's own dropouts are off, as on both sides of the cut.
        return peft.get_peft_model(model.hugging_face(), config).eval()


def _copy_in(
    peft_model: torch.nn.Module, start: AdapterState
) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    parameters = {}
    for name, pair in start.items():
        module = peft_model.get_submodule(f"base_model.model.{name}")
        a_RI, b_OR = module.lora_A["default"].weight, module.lora_B["default"].weight
        a_RI.data.copy_(torch.from_numpy(pair.a_RI))
        b_OR.data.copy_(torch.from_numpy(pair.b_OR))
        assert module.scaling["default"] == pair.scaling
        parameters[name] = (a_RI, b_OR)
    trained = sum(p.requires_grad for p in peft_model.parameters())
    assert trained == 2 * len(parameters), "PEFT adapts other modules than we do"
    return parameters


def _copy_out(
    parameters: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]], lora: LoraTerms
) -> dict[str, LoraPair]:
    return {
        name: LoraPair(
            a_RI.detach().numpy(), b_OR.detach().numpy(), lora.alpha_of(name) / len(a_RI)
        )
        for name, (a_RI, b_OR) in parameters.items()
    }


def _torch_optimizer(
    parameters: list[torch.nn.Parameter], terms: OptimizerTerms
) -> torch.optim.Optimizer:
    rate, decay = terms.learning_rate, terms.weight_decay
    if terms.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay)
    betas = (terms.beta1, terms.beta2)
    return torch.optim.AdamW(
        parameters, lr=rate, betas=betas, eps=terms.epsilon, weight_decay=decay
    )


def summed_loss(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Return the summed cross entropy of a batch under a whole Hugging Face or PEFT model."""
    shape = (len(batch.lengths), max(batch.lengths))
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    labels = torch.full(shape, NO_TARGET)
    start = 0
    for row, length in enumerate(batch.lengths):
        tokens = slice(start, start + length)
        input_ids[row, :length] = torch.from_numpy(batch.input_ids[tokens].astype(np.int64))
        labels[row, :length] = torch.from_numpy(batch.labels[tokens].astype(np.int64))
        attention_mask[row, :length] = 1
        start += length
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    flat = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(
        flat, labels.reshape(-1), ignore_index=NO_TARGET, reduction="sum"
    )
