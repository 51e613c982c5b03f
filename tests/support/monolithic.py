"""The yardstick: an ordinary PEFT training loop on the whole Hugging Face model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from edge_agent.backends.base import NO_TARGET, TokenBatch
from shared.adapters import AdapterState, LoraPair
from shared.classifier_weights import ClassifierTensors
from shared.terms import LoraTerms, OptimizerTerms
from tests.support.tiny_models import TinyModel, fresh_adapters


@dataclass(frozen=True)
class Trained:
    """Summed loss of each step, every pair after the last by module, a classifier by name."""

    losses: tuple[float, ...]
    adapters: dict[str, LoraPair]
    classifier: dict[str, np.ndarray] = field(default_factory=dict)


def train_whole(
    model: TinyModel,
    batches: Sequence[TokenBatch],
    *,
    lora: LoraTerms,
    optimizer: OptimizerTerms,
    clip_at: int | None = None,
    start: AdapterState | None = None,
    classifier: ClassifierTensors | None = None,
) -> Trained:
    """Train one step per batch with PEFT, starting from ``start``, rate falling linearly.

    ``start``: None for `fresh_adapters`; ``classifier``: None for the model's own. With
    ``clip_at`` the adapters below that block and those from it on are clipped apart.
    """
    peft_model = _peft_model(model, lora)
    if start is None:
        blocks = range(model.architecture.block_count)
        fresh = fresh_adapters(model.architecture, lora, blocks=blocks)
        start = {name: adapter.trainable for name, adapter in fresh.items()}
    parameters = _copy_in(peft_model, start)
    saved = _classifier_in(peft_model, model.classifier if classifier is None else classifier)
    trained = sum(p.requires_grad for p in peft_model.parameters())
    assert trained == 2 * len(parameters) + len(saved), "PEFT trains something else than we do"
    everything = [*(p for pair in parameters.values() for p in pair), *saved.values()]
    chosen = _torch_optimizer(everything, optimizer)
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
    end = {name: parameter.detach().numpy() for name, parameter in saved.items()}
    return Trained(tuple(losses), _copy_out(parameters, lora), end)


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
            task_type="SEQ_CLS" if model.architecture.classifies else "CAUSAL_LM",
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
    return parameters


def _classifier_in(
    peft_model: torch.nn.Module, start: ClassifierTensors
) -> dict[str, torch.nn.Parameter]:
    parameters = {}
    for name, weight in start.items():
        module, _, inside = name.partition(".")
        saved = peft_model.get_submodule(f"base_model.model.{module}").modules_to_save["default"]
        parameters[name] = saved.get_parameter(inside)
        parameters[name].data.copy_(torch.from_numpy(np.array(weight)))
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
    logits = logits_of(model, batch)
    if logits.ndim == 2:  # a classifier's
        classes = torch.from_numpy(batch.labels[batch.labels != NO_TARGET].astype(np.int64))
        return functional.cross_entropy(logits, classes, reduction="sum")
    flat = logits.reshape(-1, logits.shape[-1])
    labels = _padded(batch, batch.labels, filler=NO_TARGET).reshape(-1)
    return functional.cross_entropy(flat, labels, ignore_index=NO_TARGET, reduction="sum")


def logits_of(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Return what the whole model says of a batch, which is padded as people do it."""
    padding = getattr(model.config, "pad_token_id", None) or 0
    inputs = {
        "input_ids": _padded(batch, batch.input_ids, filler=padding),
        "attention_mask": _padded(batch, np.ones_like(batch.input_ids), filler=0),
    }
    if batch.token_types is not None and model.config.model_type == "bert":
        inputs["token_type_ids"] = _padded(batch, batch.token_types, filler=0)
    logits: torch.Tensor = model(**inputs).logits
    return logits


def _padded(batch: TokenBatch, packed: np.ndarray, *, filler: int) -> torch.Tensor:
    padded = torch.full((len(batch.lengths), max(batch.lengths)), filler)
    start = 0
    for row, length in enumerate(batch.lengths):
        tokens = packed[start : start + length].astype(np.int64)
        padded[row, :length] = torch.from_numpy(tokens)
        start += length
    return padded
