"""The Hugging Face families that can be cut: where each keeps its modules. Pure data.

A new family is a row of `FAMILIES` here and a line in the family lists of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from shared.errors import ModelError

Features: TypeAlias = tuple[int, int]
"""(in, out) features of one linear module."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """What a family's sequence classification model has after its last block and final norm.

    ``model`` is its class. It looks at the ``first`` or the ``last`` token of a sequence, through
    the frozen linear module ``pooler`` and a tanh where there is one. ``module`` is trained in
    full; ``tensors`` computes the shapes of its weights from hidden size and number of classes.
    """

    model: str
    module: str
    tensors: Callable[[int, int], Shapes]
    pooler: str | None = None
    reads: Literal["first", "last"] = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """What a model that reads in both directions has in its embeddings besides."""

    token_types: str
    norm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One Hugging Face ``model_type``: where its modules are, in full module paths.

    ``linears`` computes the adaptable linear modules of a block (path inside the block →
    in and out features) from a config; ``default_targets`` are PEFT's for the family.
    ``inputs_first``: these modules store (in, out) weights (GPT-2's Conv1D), not (out, in).
    ``causal_lm`` None: it writes no text. ``encoder`` None: each token sees only those before it.
    """

    model_type: str
    causal_lm: str | None
    classifier: Classifier
    blocks: str
    token_embedding: str
    position_embedding: str | None
    final_norm: str | None
    head: str | None
    rotary: str | None
    default_targets: tuple[str, ...]
    tied_by_default: bool
    linears: Callable[[Mapping[str, Any], int], Mapping[str, Features]]
    encoder: Encoder | None = None
    inputs_first: bool = False
    first_position: Callable[[Mapping[str, Any]], int] = lambda _: 0

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The paths of all that stands before the first block."""
        encoder = () if self.encoder is None else (self.encoder.token_types, self.encoder.norm)
        position = () if self.position_embedding is None else (self.position_embedding,)
        return (self.token_embedding, *position, *encoder)


def number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """Return the positive whole number under the first of ``keys`` that is present.

    Raises:
        ModelError: there is none, or it is no such number.
    """
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"config.json: {' / '.join(keys)} must be a positive whole number, not {value!r}"
        )
    return value


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed ``config.json``.

    Raises:
        ModelError: it is not supported, or no such variant of it is.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"models of type {model_type!r} are not supported; supported: {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config") is not None:
        raise ModelError("this base is quantised, which is not supported: use the plain weights")
    if config.get("add_cross_attention"):
        raise ModelError(
            f"a {model_type} model with cross-attention (add_cross_attention) is not supported"
        )
    if family.encoder is not None and config.get("is_decoder"):
        raise ModelError(f"a {model_type} model as a decoder (is_decoder) is not supported")
    return family


# --- linear modules ---------------------------------------------------------------------------


def _gpt2_linears(config: Mapping[str, Any], hidden: int) -> Mapping[str, Features]:
    inner = number(config, "n_inner", default=4 * hidden)
    return {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }


def _gated_linears(config: Mapping[str, Any], hidden: int) -> Mapping[str, Features]:
    """Return Llama's and Qwen's: grouped-query attention and a gated feed-forward."""
    heads = number(config, "num_attention_heads")
    groups = number(config, "num_key_value_heads", default=heads)
    # Qwen3's heads are 128 wide where its config does not say; the others divide the width.
    head = 128 if config["model_type"] == "qwen3" else hidden // heads
    head = number(config, "head_dim", default=head)
    inner = number(config, "intermediate_size")
    return {
        "self_attn.q_proj": (hidden, heads * head),
        "self_attn.k_proj": (hidden, groups * head),
        "self_attn.v_proj": (hidden, groups * head),
        "self_attn.o_proj": (heads * head, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def _bert_linears(config: Mapping[str, Any], hidden: int) -> Mapping[str, Features]:
    inner = number(config, "intermediate_size")
    attention = ("self.query", "self.key", "self.value", "output.dense")
    return {
        **{f"attention.{name}": (hidden, hidden) for name in attention},
        "intermediate.dense": (hidden, inner),
        "output.dense": (inner, hidden),
    }


# --- classifiers ------------------------------------------------------------------------------


def _score(hidden: int, classes: int) -> Shapes:
    """Return the decoders' one linear layer, which has no bias."""
    return {"score.weight": (classes, hidden)}


def _bert_classifier(hidden: int, classes: int) -> Shapes:
    return {"classifier.weight": (classes, hidden), "classifier.bias": (classes,)}


def _roberta_classifier(hidden: int, classes: int) -> Shapes:
    """Return RoBERTa's two layers: it has no pretrained pooler, so the first is new as well."""
    return {
        "classifier.dense.weight": (hidden, hidden),
        "classifier.dense.bias": (hidden,),
        "classifier.out_proj.weight": (classes, hidden),
        "classifier.out_proj.bias": (classes,),
    }


# --- families ---------------------------------------------------------------------------------


def _gated(model_type: str, prefix: str) -> Family:
    return Family(
        model_type=model_type,
        causal_lm=f"{prefix}ForCausalLM",
        classifier=Classifier(
            model=f"{prefix}ForSequenceClassification", module="score", tensors=_score
        ),
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


def _bert(
    model_type: str, classifier: Classifier, *, first_position: Callable[[Mapping[str, Any]], int]
) -> Family:
    embeddings = f"{model_type}.embeddings"
    return Family(
        model_type=model_type,
        causal_lm=None,
        classifier=classifier,
        blocks=f"{model_type}.encoder.layer",
        token_embedding=f"{embeddings}.word_embeddings",
        position_embedding=f"{embeddings}.position_embeddings",
        final_norm=None,
        head=None,
        rotary=None,
        default_targets=("query", "value"),
        tied_by_default=False,
        linears=_bert_linears,
        encoder=Encoder(
            token_types=f"{embeddings}.token_type_embeddings",
            norm=f"{embeddings}.LayerNorm",
        ),
        first_position=first_position,
    )


def _after_padding(config: Mapping[str, Any]) -> int:
    """Return RoBERTa's first position: its padding has one of its own, and all before it none."""
    padding = config.get("pad_token_id", 1)
    return padding + 1 if isinstance(padding, int) else 0


FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        model_type="gpt2",
        causal_lm="GPT2LMHeadModel",
        classifier=Classifier(
            model="GPT2ForSequenceClassification", module="score", tensors=_score
        ),
        blocks="transformer.h",
        token_embedding="transformer.wte",  # noqa: S106 - no secret
        position_embedding="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
        rotary=None,
        default_targets=("c_attn",),
        tied_by_default=True,
        linears=_gpt2_linears,
        inputs_first=True,
    ),
    "llama": _gated("llama", "Llama"),
    "qwen2": _gated("qwen2", "Qwen2"),
    "qwen3": _gated("qwen3", "Qwen3"),
    "bert": _bert(
        "bert",
        Classifier(
            model="BertForSequenceClassification",
            module="classifier",
            tensors=_bert_classifier,
            pooler="bert.pooler.dense",
            reads="first",
        ),
        first_position=lambda _: 0,
    ),
    "roberta": _bert(
        "roberta",
        Classifier(
            model="RobertaForSequenceClassification",
            module="classifier",
            tensors=_roberta_classifier,
            reads="first",
        ),
        first_position=_after_padding,
    ),
}
"""Every supported family, by ``model_type``."""
