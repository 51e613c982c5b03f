"""Cut a Hugging Face model into a front and a back at a split layer.

A part is the model's own skeleton, built without memory on torch's ``meta`` device, in which
everything that the part does not hold is an empty `nn.Identity` and everything else gets its
tensors. So modules keep their full names in the whole model, and the parameters of a part
are exactly its pieces.

Sequences are padded on the right for computing only. Where attention is causal no real token
sees the padding, so there is no mask for it; an encoder's is made of the lengths, on each side
by itself. So neither side needs more of the other's than the lengths.

Shape suffixes: B sequences, T longest length, N = sum(lengths) packed tokens, M of them that the
head reads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from shared.architecture import ModelArchitecture
from shared.errors import PlanError, ProtocolError
from shared.modeling.heads import Head, Judged, build_head
from shared.modeling.lora import PartAdapters
from shared.modeling.packing import Packing
from shared.modeling.skeleton import Tensors, materialise
from shared.terms import TrainingChoices


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
        architecture: ModelArchitecture,
        blocks: range,
        others: Collection[str],
        head: bool,
        placement: Placement,
    ) -> None:
        """Hold ``blocks``, the modules ``others`` (full paths) and perhaps the head's.

        ``config`` is the parsed config.json. Only the tensors of these modules are read.
        """
        super().__init__()
        self.architecture = architecture
        self.blocks = blocks
        self.device = placement.device
        self.dtype = placement.dtype
        self.skeleton = materialise(
            config,
            tensors,
            modules={*others, *(architecture.block_path(block) for block in blocks)},
            dtype=placement.dtype,
            device=placement.device,
            architecture=architecture,
        )
        self.head: Head | None = build_head(self.skeleton, architecture) if head else None
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
        masks = self._masks(hidden_BTD, packing)
        rotary = self._rotary(hidden_BTD)
        for block in blocks:
            module = self.skeleton.get_submodule(self.architecture.block_path(block))
            mask = masks[self._layer_type(block)]
            hidden_BTD = module(hidden_BTD, attention_mask=mask, use_cache=False, **rotary)
        return packing.unpad(hidden_BTD)

    def read(self, rows_N: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return those (M, …) of N packed rows that the head may read.

        All of them for a model of words; one of each sequence for a classifier.
        """
        if not self.architecture.classifies:
            return rows_N
        first = self.architecture.family.classifier.reads == "first"
        rows_B = packing.first_rows_B() if first else packing.last_rows_B()
        return rows_N.index_select(0, rows_B)

    def judge(self, hidden_MD: torch.Tensor, labels_M: torch.Tensor) -> Judged:
        """Return the summed cross entropy of the rows with a target, and how a classifier chose.

        ``labels_M`` int64 on the part's device; -100 where a position predicts nothing: those
        do not pass through the head at all. Differentiable in ``hidden_MD``.

        Raises:
            ProtocolError: the head is on the other side.
        """
        if self.head is None:
            raise ProtocolError("this part of the model has no head")
        targets = (labels_M >= 0).nonzero().squeeze(1)
        hidden_MD = hidden_MD.index_select(0, targets).to(self.dtype)
        return self.head.judge(hidden_MD, labels_M.index_select(0, targets))

    def loss_sum(self, hidden_MD: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        """Return the loss of `judge` alone, a float64 scalar."""
        return self.judge(hidden_MD, labels_M).loss

    def trained(self) -> Mapping[str, tuple[nn.Parameter, ...]]:
        """Return all that is trained here: (A, B) by module, a classifier's weights by name."""
        pairs: Mapping[str, tuple[nn.Parameter, ...]] = self.adapters.parameters()
        head = {} if self.head is None else self.head.parameters()
        return {**pairs, **{name: (parameter,) for name, parameter in head.items()}}

    def _layer_type(self, block: int) -> str:
        types = getattr(self._config, "layer_types", None)
        return types[block] if types else "full_attention"

    def _masks(
        self, hidden_BTD: torch.Tensor, packing: Packing
    ) -> Mapping[str, torch.Tensor | None]:
        """Return the mask per kind of attention; None: all real, or sdpa's own causal flag."""
        arguments: dict[str, Any] = {"config": self._config, "inputs_embeds": hidden_BTD}
        if self.architecture.family.encoder is not None:
            mask: Any = create_bidirectional_mask(**arguments, attention_mask=packing.real_BT())
            return {"full_attention": mask}
        arguments |= {"attention_mask": None, "past_key_values": None}
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

    def forward(
        self,
        input_ids_N: torch.Tensor,
        packing: Packing,
        token_types_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the activations (N, D) of packed token ids (N,) int64, in the part's dtype."""
        embedded_ND = self.embed(input_ids_N, packing, token_types_N)
        return self.run_blocks(embedded_ND, packing, first=0)

    def embed(
        self,
        input_ids_N: torch.Tensor,
        packing: Packing,
        token_types_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the first block takes in: the embeddings (N, D).

        ``token_types_N`` int64, of an encoder only: which text of a pair; None: all the first.
        """
        family = self.architecture.family
        hidden_ND: torch.Tensor = self.skeleton.get_submodule(family.token_embedding)(input_ids_N)
        if family.position_embedding is not None:
            position = self.skeleton.get_submodule(family.position_embedding)
            positions_N = packing.positions_N + self.architecture.first_position
            hidden_ND = hidden_ND + position(positions_N)
        if family.encoder is None:
            return hidden_ND
        table: Any = self.skeleton.get_submodule(family.encoder.token_types)
        types_N = torch.zeros_like(input_ids_N) if token_types_N is None else token_types_N
        # RoBERTa knows one type only, whatever its tokenizer says.
        hidden_ND = hidden_ND + table(types_N.clamp(max=table.num_embeddings - 1))
        normed_ND: torch.Tensor = self.skeleton.get_submodule(family.encoder.norm)(hidden_ND)
        return normed_ND


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
    training: TrainingChoices | None = None,
) -> FrontModel:
    """Return the embeddings, blocks 0 to ``split_layer`` - 1, and the head if asked for.

    ``config`` is the parsed config.json. Only the tensors of these pieces are read. ``training``:
    the run's task, see `ModelArchitecture.from_config`.

    Raises:
        ModelError: unsupported family, or a tensor is missing or misshapen.
        PlanError: the split layer does not exist.
    """
    architecture = ModelArchitecture.from_config(config, training)
    architecture.check_split_layer(split_layer)
    return FrontModel(
        config,
        tensors,
        architecture=architecture,
        blocks=range(split_layer),
        others=_modules(architecture, *architecture.family.embeddings, head=head),
        head=head,
        placement=placement,
    )


def build_back(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    first_block: int,
    head: bool,
    placement: Placement,
    training: TrainingChoices | None = None,
) -> BackModel:
    """Return blocks ``first_block`` to the last, and the head if asked for.

    ``first_block`` may be the block count where only the head is wanted. Only the tensors of
    these pieces are read. ``training``: as for `build_front`.

    Raises:
        ModelError: unsupported family, or a tensor is missing or misshapen.
        PlanError: there is nothing to hold, or no such block.
    """
    architecture = ModelArchitecture.from_config(config, training)
    if first_block > architecture.block_count - (0 if head else 1):
        raise PlanError(
            f"a server from block {first_block} on without a head has nothing to do: this model "
            f"has {architecture.block_count} blocks"
        )
    return BackModel(
        config,
        tensors,
        architecture=architecture,
        blocks=range(first_block, architecture.block_count),
        others=_modules(architecture, head=head),
        head=head,
        placement=placement,
    )


def _modules(architecture: ModelArchitecture, *paths: str, head: bool) -> set[str]:
    """Return the module paths that are no blocks: ``paths``, rotary tables, and the head's."""
    family = architecture.family
    wanted: list[str | None] = [*paths, family.rotary]
    if head and architecture.classifies:
        wanted += [family.final_norm, architecture.frozen_head, family.classifier.module]
    elif head:
        tied = architecture.tied_embeddings
        wanted += [family.final_norm, family.token_embedding if tied else family.head]
    return {path for path in wanted if path is not None}
