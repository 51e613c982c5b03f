"""Cut a Hugging Face causal language model into a front and a back at a split layer.

A part is the model's own skeleton, built without memory on torch's ``meta`` device, in which
everything that the part does not hold is an empty `nn.Identity` and everything else gets its
tensors. So modules keep their full names in the whole model, and the parameters of a part
are exactly its pieces.

Sequences are padded on the right for computing only. Attention is causal, so no real token
sees the padding, and no padding mask exists: neither side needs more than the lengths.

Shape suffixes: B sequences, T longest length, N = sum(lengths) packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from shared.architecture import ModelArchitecture
from shared.errors import PlanError
from shared.modeling.lora import PartAdapters
from shared.modeling.loss import summed_cross_entropy
from shared.modeling.packing import Packing
from shared.modeling.skeleton import Tensors, materialise


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a part lives, in which dtype, and what is to be known of its adapters."""

    dtype: torch.dtype
    device: torch.device
    lora_dropout: float = 0.0
    freeze_a: bool = False


class ModelPart(nn.Module):
    """Some consecutive blocks of a model, frozen, with adapters, and perhaps its head.

    Always in eval mode: the base's own dropouts are off, only LoRA dropout exists. Not
    thread-safe.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Tensors,
        *,
        blocks: range,
        others: Collection[str],
        placement: Placement,
    ) -> None:
        """Hold ``blocks`` and the modules ``others`` (their full paths); see `build_front`.

        ``config`` is the parsed config.json. Only the tensors of these modules are read.
        """
        super().__init__()
        self.architecture = ModelArchitecture.from_config(config)
        self.blocks = blocks
        self.device = placement.device
        self.dtype = placement.dtype
        self.skeleton = materialise(
            config,
            tensors,
            modules={*others, *(self.architecture.block_path(block) for block in blocks)},
            dtype=placement.dtype,
            device=placement.device,
        )
        self.adapters = PartAdapters(
            self.skeleton, dropout=placement.lora_dropout, freeze_a=placement.freeze_a
        )
        self._config: Any = self.skeleton.config

    def run_blocks(self, hidden_ND: torch.Tensor, packing: Packing, *, first: int) -> torch.Tensor:
        """Return the packed hidden states (N, D) after blocks ``first`` to the part's last.

        ``hidden_ND`` in any float dtype; the result is in the part's.
        """
        blocks = range(first, self.blocks.stop)
        if not blocks:
            return hidden_ND.to(self.dtype)
        hidden_BTD = packing.pad(hidden_ND.to(self.dtype))
        masks = self._masks(hidden_BTD)
        rotary = self._rotary(hidden_BTD)
        for block in blocks:
            module = self.skeleton.get_submodule(self.architecture.block_path(block))
            mask = masks[self._layer_type(block)]
            hidden_BTD = module(hidden_BTD, attention_mask=mask, use_cache=False, **rotary)
        return packing.unpad(hidden_BTD)

    def loss_sum(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """Return the summed cross entropy (float64 scalar) of the positions with a target.

        ``labels_N`` int64 on the part's device; -100 where a position predicts nothing: those
        do not pass through the head at all. Differentiable in ``hidden_ND``.
        """
        family = self.architecture.family
        targets_M = (labels_N >= 0).nonzero().squeeze(1)
        hidden_MD = hidden_ND.index_select(0, targets_M).to(self.dtype)
        hidden_MD = self.skeleton.get_submodule(family.final_norm)(hidden_MD)
        projection = family.token_embedding if self.architecture.tied_embeddings else family.head
        weight_VD = self.skeleton.get_parameter(projection + ".weight")
        return summed_cross_entropy(hidden_MD, weight_VD, labels_N.index_select(0, targets_M))

    def _layer_type(self, block: int) -> str:
        types = getattr(self._config, "layer_types", None)
        return types[block] if types else "full_attention"

    def _masks(self, hidden_BTD: torch.Tensor) -> Mapping[str, torch.Tensor | None]:
        """Return the causal mask per kind of attention; None lets sdpa use its causal flag."""
        arguments: dict[str, Any] = {
            "config": self._config,
            "inputs_embeds": hidden_BTD,
            "attention_mask": None,
            "past_key_values": None,
        }
        masks: dict[str, Any] = {"full_attention": create_causal_mask(**arguments)}
        if "sliding_attention" in (getattr(self._config, "layer_types", None) or ()):
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        return masks

    def _rotary(self, hidden_BTD: torch.Tensor) -> Mapping[str, Any]:
        path = self.architecture.family.rotary
        if path is None:
            return {}
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device).unsqueeze(0)
        rotary = self.skeleton.get_submodule(path)
        return {"position_embeddings": rotary(hidden_BTD, position_ids=positions_1T)}


class FrontModel(ModelPart):
    """The device's part: the embeddings, blocks 0 to k - 1, and with labels: device the head."""

    def forward(self, input_ids_N: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return the activations (N, D) of packed token ids (N,) int64, in the part's dtype."""
        return self.run_blocks(self.embed(input_ids_N, packing), packing, first=0)

    def embed(self, input_ids_N: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return what the first block takes in: the embeddings (N, D)."""
        family = self.architecture.family
        hidden_ND: torch.Tensor = self.skeleton.get_submodule(family.token_embedding)(input_ids_N)
        if family.position_embedding is not None:
            position = self.skeleton.get_submodule(family.position_embedding)
            hidden_ND = hidden_ND + position(packing.positions_N)
        return hidden_ND


class BackModel(ModelPart):
    """The server's part: blocks ``first_block`` to the last, and with labels: server the head."""

    def forward(
        self, hidden_ND: torch.Tensor, packing: Packing, *, split_layer: int
    ) -> torch.Tensor:
        """Return the hidden states (N, D) that blocks ``split_layer`` and up make of these."""
        return self.run_blocks(hidden_ND, packing, first=split_layer)


def build_front(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    split_layer: int,
    head: bool,
    placement: Placement,
) -> FrontModel:
    """Return the embeddings, blocks 0 to ``split_layer`` - 1, and the head if asked for.

    ``config`` is the parsed config.json. Only the tensors of these pieces are read.

    Raises:
        ModelError: unsupported family, or a tensor is missing or misshapen.
        PlanError: the split layer does not exist.
    """
    architecture = ModelArchitecture.from_config(config)
    architecture.check_split_layer(split_layer)
    family = architecture.family
    embeddings = (family.token_embedding, family.position_embedding)
    return FrontModel(
        config,
        tensors,
        blocks=range(split_layer),
        others=_modules(architecture, *embeddings, head=head),
        placement=placement,
    )


def build_back(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    first_block: int,
    head: bool,
    placement: Placement,
) -> BackModel:
    """Return blocks ``first_block`` to the last, and the head if asked for.

    ``first_block`` may be the block count where only the head is wanted. Only the tensors of
    these pieces are read.

    Raises:
        ModelError: unsupported family, or a tensor is missing or misshapen.
        PlanError: there is nothing to hold, or no such block.
    """
    architecture = ModelArchitecture.from_config(config)
    if first_block > architecture.block_count - (0 if head else 1):
        raise PlanError(
            f"a server from block {first_block} on without a head has nothing to do: this model "
            f"has {architecture.block_count} blocks"
        )
    return BackModel(
        config,
        tensors,
        blocks=range(first_block, architecture.block_count),
        others=_modules(architecture, head=head),
        placement=placement,
    )


def _modules(architecture: ModelArchitecture, *paths: str | None, head: bool) -> set[str]:
    """Return the module paths that are no blocks: ``paths``, rotary tables, and the head's."""
    family = architecture.family
    projection = family.token_embedding if architecture.tied_embeddings else family.head
    head_paths = (family.final_norm, projection) if head else ()
    return {path for path in (*paths, family.rotary, *head_paths) if path is not None}
