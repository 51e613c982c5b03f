"""What stands before the first block and after the last, as functions to trace.

Shape suffixes: B sequences, T padded length, M rows that a head reads, D hidden size,
V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from coordinator.graphs.model_to_trace import (
    BATCH,
    LENGTH,
    ROWS,
    ModelToTrace,
    named_gradients,
)
from coordinator.graphs.tracing import Input, Traceable, Values
from shared.modeling.heads import ClassifierHead


def embeddings(model: ModelToTrace) -> Traceable:
    """Return what is added to the tokens' own embeddings ``tokens`` (B, T, D)."""
    family, first_position = model.architecture.family, model.architecture.first_position
    inputs = {"tokens": Input((BATCH, LENGTH, model.hidden_size))}
    if family.encoder is not None:
        inputs["token_types"] = Input((BATCH, LENGTH), torch.int64)
    inputs |= model.weight_inputs(*(p for p in family.embeddings if p != family.token_embedding))

    def run(skeleton: nn.Module, values: Values) -> torch.Tensor:
        hidden_BTD = values["tokens"]
        if family.position_embedding is not None:
            at_T = torch.arange(hidden_BTD.shape[1]) + first_position
            hidden_BTD = hidden_BTD + skeleton.get_submodule(family.position_embedding)(at_T)
        if family.encoder is None:
            return hidden_BTD
        table: Any = skeleton.get_submodule(family.encoder.token_types)
        types_BT = values["token_types"].clamp(max=table.num_embeddings - 1)
        hidden_BTD = hidden_BTD + table(types_BT)
        normed_BTD: torch.Tensor = skeleton.get_submodule(family.encoder.norm)(hidden_BTD)
        return normed_BTD

    return Traceable(inputs, lambda values: {"output": model.run(run, values)})


def head(model: ModelToTrace) -> Traceable:
    """Return the loss of each row and the gradients of its sum."""
    return _classifier(model) if model.architecture.classifies else _words(model)


def _words(model: ModelToTrace) -> Traceable:
    architecture, family = model.architecture, model.architecture.family
    tied = architecture.tied_embeddings
    projection = str(family.token_embedding if tied else architecture.frozen_head)
    norms = () if family.final_norm is None else (family.final_norm,)

    def run(skeleton: nn.Module, values: Values) -> torch.Tensor:
        normed_MD = values["hidden"]
        for norm in norms:
            normed_MD = skeleton.get_submodule(norm)(normed_MD)
        table: Any = skeleton.get_submodule(projection)
        loss_M: torch.Tensor = _FrozenProjection.apply(  # type: ignore[no-untyped-call]
            normed_MD, table.weight, values["targets"]
        )
        return loss_M

    def compute(values: Values) -> dict[str, torch.Tensor]:
        hidden = values["hidden"].detach().requires_grad_()
        with torch.enable_grad():
            loss_M = model.run(run, {**values, "hidden": hidden})
        (gradient,) = torch.autograd.grad(loss_M, hidden, torch.ones_like(loss_M))
        return {"loss": loss_M.detach(), "gradient.hidden": gradient}

    return Traceable(_head_inputs(model, *norms, projection), compute)


def _classifier(model: ModelToTrace) -> Traceable:
    architecture = model.architecture
    trained = tuple(architecture.classifier_shapes())
    frozen = (architecture.family.final_norm, architecture.frozen_head)

    def run(skeleton: nn.Module, values: Values) -> torch.Tensor:
        norm, pooler = (None if p is None else skeleton.get_submodule(p) for p in frozen)
        classifier = ClassifierHead(skeleton, architecture, norm=norm, pooler=pooler)
        return classifier.logits(values["hidden"])

    def compute(values: Values) -> dict[str, torch.Tensor]:
        names = ["hidden", *(f"weight.{name}" for name in trained)]
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            logits_MK = model.run(run, {**values, **leaves})
            chances_MK = logits_MK.log_softmax(dim=1)
            loss_M = -chances_MK.gather(1, values["targets"].unsqueeze(1)).squeeze(1)
        gradients = torch.autograd.grad(loss_M, list(leaves.values()), torch.ones_like(loss_M))
        return {
            "loss": loss_M.detach(),
            "logits": logits_MK.detach(),
            **named_gradients(names, gradients),
        }

    paths = (path for path in frozen if path is not None)
    return Traceable(_head_inputs(model, *paths, architecture.family.classifier.module), compute)


def _head_inputs(model: ModelToTrace, *paths: str) -> Mapping[str, Input]:
    return {
        "hidden": Input((ROWS, model.hidden_size)),
        "targets": Input((ROWS,), torch.int64),
        **model.weight_inputs(*paths),
    }


class _FrozenProjection(torch.autograd.Function):
    """Loss of each row, -log softmax(W h_m)[target_m], with ∂/∂h_m = softmax(W h_m) W - W[target].

    Written out, as in `shared.modeling.loss`: autograd would make one more matrix of logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor
    ) -> torch.Tensor:
        chances_MV = (hidden_MD @ weight_VD.t()).log_softmax(dim=1)
        ctx.kept = chances_MV, weight_VD, targets_M
        return -chances_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of the sum of all rows' losses."""
        chances_MV, weight_VD, targets_M = ctx.kept
        own_MD = weight_VD.index_select(0, targets_M)
        return chances_MV.exp() @ weight_VD - own_MD, None, None
