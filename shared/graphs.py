"""What the graphs are called that a device without torch computes with, and which it needs.

A graph is an ONNX file without weights: weights, LoRA matrices and all that the forward pass
keeps are its inputs, by name. So all blocks of one *kind* share their graphs, whatever the split
layer, the ranks and the batch. The coordinator exports them (`coordinator.graphs`).

Names of inputs and outputs (B sequences, T padded length, M rows, D hidden, K classes):

* ``hidden`` (B, T, D), a block's input, or (M, D), the rows that a head reads; ``output``.
* ``weight.<name inside the block>``, or a full name in embeddings and heads: a frozen weight;
  ``scale.<name>`` (1, O) or (O, 1): the other factor of one that is in 8 bits.
* ``a.<module>`` (R, I), ``b.<module>`` (O, R), ``scaling.<module>`` (): the trained pair;
  ``frozen_a.<module>`` (F, I), ``frozen_b.<module>`` (O, F): the residual. Any rank may be 0.
* ``kept.<module>`` (B·T, O): what a linear module gave in the forward pass.
* ``mask.<module>`` (B, T, I): LoRA dropout's, where there is dropout.
* ``gradient`` of ``output``; ``gradient.hidden``, ``gradient.a.<module>``, and so on, of those.
* ``input.<module>`` (B·T, I), ``gradient.kept.<module>`` (B·T, O): what importance is made of.
* ``lengths`` (B,) int64 in blocks of a model that reads in both directions.
* ``targets`` (M,) int64, ``loss`` (M,), a classifier's ``logits`` (M, K).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from shared.families import Family, family_of

Direction: TypeAlias = Literal["forward", "backward", "lowest", "probe"]
"""``lowest``: backward without the gradient of ``hidden``; ``probe``: for importance."""

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "lowest", "probe")
EMBEDDINGS = "graph.embeddings"
"""Adds to the tokens' embeddings ``tokens`` (B, T, D) what a family has besides."""
HEAD = "graph.head"
LOSS = "graph.loss"
"""The head without any gradient."""


def block_kind(config: Mapping[str, Any], block: int, *, int8_blocks: int = 0) -> str:
    """Return the kind of a block of the model that a parsed ``config.json`` describes.

    Blocks of one kind differ in nothing but their weights. ``int8_blocks``: of so many blocks, from
    0 on, the weights are in 8 bits.
    """
    kind = _attention(config, block)
    # GPT-2's option to divide attention by the number of the block.
    kind = f"{kind}.{block}" if config.get("scale_attn_by_inverse_layer_idx") else kind
    return f"{kind}.int8" if block < int8_blocks else kind


def _attention(config: Mapping[str, Any], block: int) -> str:
    types = config.get("layer_types")
    if isinstance(types, list):
        return str(types[block])
    # Qwen's older files say it so; what they leave out is what transformers takes for it.
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    slides = window is not None and block >= config.get("max_window_layers", 28)
    return "sliding_attention" if slides else "full_attention"


def graph_name(kind: str, direction: Direction) -> str:
    """Return the name of a graph of blocks."""
    return f"graph.{kind}.{direction}"


def adds_to_tokens(family: Family) -> bool:
    """Tell whether a family has more in its embeddings than those of the tokens."""
    return family.position_embedding is not None or family.encoder is not None


def graph_names(
    config: Mapping[str, Any], *, blocks: range, head_on_device: bool, int8_blocks: int = 0
) -> tuple[str, ...]:
    """Return the names of all graphs that a device with these blocks may need."""
    kinds = dict.fromkeys(block_kind(config, j, int8_blocks=int8_blocks) for j in blocks)
    embeddings = (EMBEDDINGS,) if adds_to_tokens(family_of(config)) else ()
    head = (HEAD, LOSS) if head_on_device else ()
    return (*embeddings, *(graph_name(k, d) for k in kinds for d in DIRECTIONS), *head)
