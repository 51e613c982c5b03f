"""What hsplit must know of a model family without loading it: paths, pieces, sizes.

Pure data and pure functions, stdlib only: the planner, the agent and the model store all ask
here. A model is cut into *pieces*: ``embeddings``, ``block.<j>``, ``final_norm`` and ``head``.
With tied embeddings there is no ``head`` piece: the token embedding is the output projection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from shared.errors import ModelError, PlanError
from shared.terms import LoraTerms

Features: TypeAlias = tuple[int, int]
"""(in, out) features of one linear module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One Hugging Face ``model_type``: where its modules are, in full module paths.

    ``linears`` computes the adaptable linear modules of a block (path inside the block →
    in and out features) from a config; ``default_targets`` are PEFT's for the family.
    """

    model_type: str
    causal_lm: str
    blocks: str
    token_embedding: str
    position_embedding: str | None
    final_norm: str
    head: str
    rotary: str | None
    default_targets: tuple[str, ...]
    tied_by_default: bool
    linears: Callable[[Mapping[str, Any], int], Mapping[str, Features]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArchitecture:
    """The shape of one model: its family, and the numbers that its config holds."""

    family: Family
    block_count: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    linears: Mapping[str, Features]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelArchitecture:
        """Return the architecture that a parsed ``config.json`` describes.

        Raises:
            ModelError: the family is not supported (the message lists those that are), the
                base is quantised, or a number is missing or impossible.
        """
        family = _family(config)
        hidden_size = _number(config, "hidden_size", "n_embd")
        return cls(
            family=family,
            block_count=_number(config, "num_hidden_layers", "n_layer"),
            hidden_size=hidden_size,
            vocab_size=_number(config, "vocab_size"),
            max_positions=_number(config, "max_position_embeddings", "n_positions"),
            tied_embeddings=bool(config.get("tie_word_embeddings", family.tied_by_default)),
            linears=family.linears(config, hidden_size),
        )

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all that decides what a block costs: equal shapes, equal measurements."""
        shape = (self.family.model_type, self.hidden_size, self.vocab_size, self.tied_embeddings)
        text = json.dumps([*shape, sorted(self.linears.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def block_parameters(self) -> int:
        """Weights in the linear modules of one block: all but a few vectors of it."""
        return sum(features[0] * features[1] for features in self.linears.values())

    def block_path(self, block: int) -> str:
        """Return the module path of block ``block`` (counted from 0 over the whole model)."""
        return f"{self.family.blocks}.{block}"

    def block_of(self, module: str) -> int:
        """Return the number of the block that a full module or tensor path lies in.

        Raises:
            ModelError: it lies in no block of this model.
        """
        prefix = self.family.blocks + "."
        number = module[len(prefix) :].partition(".")[0] if module.startswith(prefix) else ""
        if not number.isdecimal() or int(number) >= self.block_count:
            raise ModelError(
                f"{module} lies in no block of this {self.family.model_type} model: its "
                f"blocks are {prefix}0 to {prefix}{self.block_count - 1}"
            )
        return int(number)

    def features(self, module: str) -> Features:
        """Return (in, out) features of an adaptable module given by its full path.

        Raises:
            ModelError: the model has no such module, or it cannot be adapted.
        """
        inside = module[len(self.block_path(self.block_of(module))) + 1 :]
        if inside not in self.linears:
            raise ModelError(f"{module} cannot be adapted; in each block: {_names(self.linears)}")
        return self.linears[inside]

    def full_name(self, stored_name: str) -> str:
        """Return a stored tensor's name in the causal language model.

        Some checkpoints leave out the first part, GPT-2's own on the hub among them.
        """
        prefix = self.family.blocks.partition(".")[0] + "."
        has_it = stored_name.startswith((prefix, self.family.head + "."))
        return stored_name if has_it else prefix + stored_name

    def piece_of(self, tensor_name: str) -> str | None:
        """Return the piece that holds a tensor of the full model.

        None for what no side needs: buffers that old checkpoints store, and the second name
        of a tied embedding.
        """
        family = self.family
        owner, _, leaf = tensor_name.rpartition(".")
        if owner in (family.token_embedding, family.position_embedding):
            return "embeddings"
        if owner == family.final_norm:
            return "final_norm"
        if owner == family.head:
            return None if self.tied_embeddings else "head"
        if not tensor_name.startswith(family.blocks + "."):
            return None
        # Masks and rotary tables are buffers, stored by old versions of transformers.
        is_mask = owner.endswith(".attn") and leaf in ("bias", "masked_bias")
        if is_mask or leaf == "inv_freq":
            return None
        return f"block.{self.block_of(tensor_name)}"

    def head_pieces(self) -> tuple[str, ...]:
        """Return the pieces that final norm, output projection and loss need."""
        return ("final_norm", "embeddings" if self.tied_embeddings else "head")

    def front_pieces(self, split_layer: int, *, head_on_device: bool) -> tuple[str, ...]:
        """Return the pieces of a device, in the order in which the model applies them.

        Raises:
            PlanError: the split layer does not exist.
        """
        self.check_split_layer(split_layer)
        blocks = tuple(f"block.{j}" for j in range(split_layer))
        pieces = ("embeddings", *blocks)
        head = self.head_pieces() if head_on_device else ()
        return pieces + tuple(piece for piece in head if piece not in pieces)

    def check_split_layer(self, split_layer: int) -> None:
        """Raise PlanError unless 1 <= split layer <= block count."""
        if not 1 <= split_layer <= self.block_count:
            raise PlanError(
                f"split layer {split_layer} does not exist: this model has "
                f"{self.block_count} blocks, so choose 1 to {self.block_count}"
            )

    def check_max_length(self, max_length: int) -> None:
        """Raise PlanError where sequences could be longer than the model has positions."""
        if max_length > self.max_positions:
            raise PlanError(
                f"training.max_length is {max_length} tokens, but this model has "
                f"{self.max_positions} positions: choose at most {self.max_positions}"
            )

    def target_modules(self, lora: LoraTerms, *, blocks: range) -> dict[str, int]:
        """Return the adapted modules of ``blocks``: full module path → rank, rank 0 left out.

        A target matches as in PEFT: it is the module's path, or ends it after a dot.

        Raises:
            PlanError: a target matches no module of the model, or a rank exceeds the smaller
                of a weight's two sides.
        """
        targets = lora.target_modules or self.family.default_targets
        self._check_targets(targets)
        ranks: dict[str, int] = {}
        for block in blocks:
            for inside, features in self.linears.items():
                module = f"{self.block_path(block)}.{inside}"
                if any(_matches(module, target) for target in targets):
                    rank = _checked_rank(module, lora.rank_of(module), features=features)
                    ranks.update({module: rank} if rank else {})
        return ranks

    def adaptable_modules(self, lora: LoraTerms, *, blocks: range) -> tuple[str, ...]:
        """Return the target modules of ``blocks``, whatever rank they have, also none.

        Raises:
            PlanError: a target matches no module of the model.
        """
        whatever_rank = LoraTerms(r=1, target_modules=lora.target_modules)
        return tuple(self.target_modules(whatever_rank, blocks=blocks))

    def _check_targets(self, targets: tuple[str, ...]) -> None:
        modules = [
            f"{self.block_path(block)}.{inside}"
            for block in range(self.block_count)
            for inside in self.linears
        ]
        for target in targets:
            if not any(_matches(module, target) for module in modules):
                raise PlanError(
                    f"target module {target!r} does not exist in this "
                    f"{self.family.model_type} model; each block has {_names(self.linears)}"
                )


def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)


def _checked_rank(module: str, rank: int, *, features: Features) -> int:
    if rank > min(features):
        raise PlanError(
            f"rank {rank} for {module} is more than the smaller side of its weight "
            f"({features[0]} in, {features[1]} out): choose at most {min(features)}"
        )
    return rank


def _names(linears: Mapping[str, Features]) -> str:
    return ", ".join(sorted(linears))


def _number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """Return the positive whole number under the first of ``keys`` that is present."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"config.json: {' / '.join(keys)} must be a positive whole number, not {value!r}"
        )
    return value


def _gpt2_linears(config: Mapping[str, Any], hidden: int) -> Mapping[str, Features]:
    inner = _number(config, "n_inner", default=4 * hidden)
    return {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }


def _gated_linears(config: Mapping[str, Any], hidden: int) -> Mapping[str, Features]:
    """Return Llama's and Qwen's: grouped-query attention and a gated feed-forward."""
    heads = _number(config, "num_attention_heads")
    groups = _number(config, "num_key_value_heads", default=heads)
    # Qwen3's heads are 128 wide where its config does not say; the others divide the width.
    head = 128 if config["model_type"] == "qwen3" else hidden // heads
    head = _number(config, "head_dim", default=head)
    inner = _number(config, "intermediate_size")
    return {
        "self_attn.q_proj": (hidden, heads * head),
        "self_attn.k_proj": (hidden, groups * head),
        "self_attn.v_proj": (hidden, groups * head),
        "self_attn.o_proj": (heads * head, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def _gated(model_type: str, causal_lm: str) -> Family:
    return Family(
        model_type=model_type,
        causal_lm=causal_lm,
        blocks="model.layers",
        token_embedding="model.embed_tokens",  # noqa: S106 - no secret
        position_embedding=None,
        final_norm="model.norm",
        head="lm_head",
        rotary="model.rotary_emb",
        default_targets=("q_proj", "v_proj"),
        tied_by_default=False,
        linears=_gated_linears,
    )


FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        model_type="gpt2",
        causal_lm="GPT2LMHeadModel",
        blocks="transformer.h",
        token_embedding="transformer.wte",  # noqa: S106 - no secret
        position_embedding="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
        rotary=None,
        default_targets=("c_attn",),
        tied_by_default=True,
        linears=_gpt2_linears,
    ),
    "llama": _gated("llama", "LlamaForCausalLM"),
    "qwen2": _gated("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _gated("qwen3", "Qwen3ForCausalLM"),
}
"""Every supported family, by ``model_type``."""


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"models of type {model_type!r} are not supported; supported: {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config") is not None:
        raise ModelError("this base is quantised, which is not supported: use the plain weights")
    if config.get("add_cross_attention"):
        raise ModelError("GPT-2 with cross-attention (add_cross_attention) is not supported")
    return family
