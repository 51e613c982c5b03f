"""Tiny models of every supported family, with random weights, and work for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from edge_agent.backends.base import NO_TARGET, FrontBase, TokenBatch
from shared.adapters import HeldAdapters, LoraPair, ModuleAdapter
from shared.architecture import ModelArchitecture
from shared.classifier_weights import ClassifierTensors
from shared.terms import LoraTerms, TrainingChoices

VOCAB_SIZE = 101
_GATED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # Left on in the config: the base's own dropout must not act in training either.
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    "llama": {"model_type": "llama", **_GATED},
    "qwen2": {"model_type": "qwen2", **_GATED, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_GATED, "head_dim": 16},
}
"""config.json by family: grouped queries, biases (qwen2), tied (gpt2, qwen2) and untied heads."""

FAMILIES = tuple(CONFIGS)
"""Those that write text."""

PADDING = 1
_BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 70,
    "pad_token_id": PADDING,
    # At 0.02 attention is the same everywhere, and Adam divides the queries' gradients by less
    # than its epsilon.
    "initializer_range": 0.2,
}
ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT, "type_vocab_size": 2},
    "roberta": {"model_type": "roberta", **_BERT, "type_vocab_size": 1},
}
"""Dropouts stay at their 0.1, which must not act in training either."""

CLASSIFYING = (*FAMILIES, *ENCODERS)
CLASSES = ("no", "maybe", "yes")


@dataclass(frozen=True)
class TinyModel:
    """A model with random weights: its config, tensors by full name, and architecture.

    ``training``: the task that it is for; None: to write text.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    training: TrainingChoices | None = None

    @property
    def architecture(self) -> ModelArchitecture:
        return ModelArchitecture.from_config(self.config, self.training)

    @property
    def classifier(self) -> ClassifierTensors:
        """The random weights of its classifier, if it has one."""
        shapes = self.architecture.classifier_shapes()
        return {name: self.tensors[name].numpy() for name in shapes}

    def hugging_face(self) -> transformers.PreTrainedModel:
        """Return a new plain Hugging Face model with these weights, in eval mode."""
        model = _plain(self.config, self.architecture)
        model.load_state_dict({name: tensor.clone() for name, tensor in self.tensors.items()})
        model.tie_weights()
        return model.eval()

    def write_pieces(self, folder: Path) -> dict[str, Path]:
        """Write each piece as a safetensors file; return the files by piece name."""
        pieces: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            piece = self.architecture.piece_of(name)
            if piece is not None:
                pieces.setdefault(piece, {})[name] = tensor.contiguous()
        for piece, tensors in pieces.items():
            save_file(tensors, folder / f"{piece}.safetensors")
        return {piece: folder / f"{piece}.safetensors" for piece in pieces}

    def front_base(self, folder: Path, *, split_layer: int, head: bool) -> FrontBase:
        """Write the pieces and return what a device with this split layer would hold."""
        files = self.write_pieces(folder)
        names = self.architecture.front_pieces(split_layer, head_on_device=head)
        return FrontBase(
            json.dumps(self.config), {name: files[name] for name in names}, split_layer
        )


def tiny_model(
    family: str, *, seed: int = 0, training: TrainingChoices | None = None, **changes: Any
) -> TinyModel:
    """Return a model of ``family``; ``changes`` replace entries of its config."""
    config = {**{**CONFIGS, **ENCODERS}[family], **changes}
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = _plain(config, ModelArchitecture.from_config(config, training))
    # Biases and norms start at 0 and 1, where an error in them would not show.
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.random.set_rng_state(state)
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return TinyModel(config, tensors, training)


def tiny_classifier(family: str, *, seed: int = 0, **changes: Any) -> TinyModel:
    """Return a model of ``family`` that tells `CLASSES` apart."""
    training = TrainingChoices(task="classification", classes=CLASSES)
    changes = {"pad_token_id": PADDING, **changes}
    return tiny_model(family, seed=seed, training=training, **changes)


def classified_batch(
    lengths: tuple[int, ...], architecture: ModelArchitecture, *, seed: int = 0
) -> TokenBatch:
    """Return random pairs of texts of these lengths, each with a random class."""
    random = np.random.default_rng(seed)
    tokens = random.integers(PADDING + 1, VOCAB_SIZE, sum(lengths), dtype=np.int32)
    labels = np.full(sum(lengths), NO_TARGET, dtype=np.int32)
    types = np.zeros(sum(lengths), dtype=np.int32)
    ends = np.cumsum(lengths)
    for length, end in zip(lengths, ends, strict=True):
        first = architecture.family.classifier.reads == "first"
        labels[end - length if first else end - 1] = random.integers(architecture.class_count)
        types[end - length // 2 : end] = 1
    return TokenBatch(tokens, labels, lengths, types)


def tiny_batch(
    lengths: tuple[int, ...], *, seed: int = 0, prompt: int = 2, vocab_size: int = VOCAB_SIZE
) -> TokenBatch:
    """Return random sequences of these lengths; the first ``prompt`` positions have no target."""
    random = np.random.default_rng(seed)
    sequences = [random.integers(0, vocab_size, length + 1, dtype=np.int32) for length in lengths]
    labels = [sequence[1:].copy() for sequence in sequences]
    for label in labels:
        label[:prompt] = NO_TARGET
    return TokenBatch(
        np.concatenate([sequence[:-1] for sequence in sequences]), np.concatenate(labels), lengths
    )


def cut(batch: TokenBatch, micro_batch: int) -> Iterator[TokenBatch]:
    """Cut a batch into micro-batches of at most ``micro_batch`` sequences."""
    ends = np.cumsum([0, *batch.lengths])
    for first in range(0, len(batch.lengths), micro_batch):
        lengths = batch.lengths[first : first + micro_batch]
        rows = slice(ends[first], ends[first + len(lengths)])
        types = None if batch.token_types is None else batch.token_types[rows]
        yield TokenBatch(batch.input_ids[rows], batch.labels[rows], lengths, types)


def fresh_adapters(
    architecture: ModelArchitecture, lora: LoraTerms, *, blocks: range, seed: int = 0
) -> HeldAdapters:
    """Return random adapters for the targets of ``lora``; B is not zero, so that A learns too."""
    adapters = {}
    for module, rank in architecture.target_modules(lora, blocks=blocks).items():
        inputs, outputs = architecture.features(module)
        # Seeded by the module, so that a part's adapters are those of the whole.
        random = np.random.default_rng([seed, *module.encode()])
        a_RI = random.uniform(-1, 1, (rank, inputs)).astype(np.float32) / np.sqrt(inputs)
        b_OR = (0.05 * random.standard_normal((outputs, rank))).astype(np.float32)
        pair = LoraPair(a_RI.astype(np.float32), b_OR, lora.alpha_of(module) / rank)
        adapters[module] = ModuleAdapter(pair)
    return adapters


def _plain(
    config: Mapping[str, Any], architecture: ModelArchitecture
) -> transformers.PreTrainedModel:
    parsed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    if architecture.classifies:
        parsed.num_labels = architecture.class_count
    model: transformers.PreTrainedModel = getattr(transformers, architecture.model_class)(parsed)
    return model
