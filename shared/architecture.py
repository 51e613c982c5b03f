"""What hsplit must know of a model without loading it: paths, pieces, sizes.

Pure data and pure functions, stdlib only: the planner, the agent and the model store all ask
here. A model is cut into *pieces*: ``embeddings``, ``block.<j>``, ``final_norm`` and ``head``.
With tied embeddings there is no ``head`` piece: the token embedding is the output projection.
A classifying model's ``head`` is the pooler, where it has one; its classifier is no piece: it
is not of the base, but new in every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import ModelError, PlanError
from shared.families import FAMILIES, Family, Features, family_of, number
from shared.terms import LoraTerms, Task, TrainingChoices

__all__ = ["FAMILIES", "Family", "Features", "ModelArchitecture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArchitecture:
    """The shape of one model under a run's task: its family, and what its config says.

    ``class_count``: classes of a classifying model, else 0. ``first_position``: the number of a
    sequence's first position; ``max_positions``: how many there are from it on.
    """

    family: Family
    task: Task
    class_count: int
    block_count: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    linears: Mapping[str, Features]
    first_position: int = 0

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], training: TrainingChoices | None = None
    ) -> ModelArchitecture:
        """Return the architecture that a parsed ``config.json`` describes.

        ``training`` names the run's task and classes; None: what the family is made for, with
        two classes if that is to classify.

        Raises:
            ModelError: the family is not supported (the message lists those that are) or not
                made for this task, the base is quantised, or a number is missing or impossible.
        """
        family = family_of(config)
        task, class_count = _task(family, training)
        hidden_size = number(config, "hidden_size", "n_embd")
        first_position = family.first_position(config)
        positions = number(config, "max_position_embeddings", "n_positions")
        tied = bool(config.get("tie_word_embeddings", family.tied_by_default))
        return cls(
            family=family,
            task=task,
            class_count=class_count,
            block_count=number(config, "num_hidden_layers", "n_layer"),
            hidden_size=hidden_size,
            vocab_size=number(config, "vocab_size"),
            max_positions=positions - first_position,
            tied_embeddings=tied,
            linears=family.linears(config, hidden_size),
            first_position=first_position,
        )

    @classmethod
    def from_json(cls, text: str, training: TrainingChoices | None = None) -> ModelArchitecture:
        """Return the architecture that the text of a ``config.json`` describes; see `from_config`.

        Raises:
            ModelError: it is no JSON object either.
        """
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"config.json is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ModelError("config.json is not a JSON object")
        return cls.from_config(config, training)

    @property
    def classifies(self) -> bool:
        """Whether the model ends in a classifier, not in words."""
        return self.task == "classification"

    @property
    def model_class(self) -> str:
        """The Hugging Face class of this family for the task."""
        return self.family.classifier.model if self.classifies else str(self.family.causal_lm)

    @property
    def output_count(self) -> int:
        """Between how many targets the head chooses: classes, or words."""
        return self.class_count if self.classifies else self.vocab_size

    def classifier_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each tensor of the classifier by full name; none: no classifier."""
        if not self.classifies:
            return {}
        return self.family.classifier.tensors(self.hidden_size, self.class_count)

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
        """Return a stored tensor's name in the Hugging Face model of the task.

        Some checkpoints leave out the first part, GPT-2's own on the hub among them; old ones
        of BERT have other words for the weights of a norm.
        """
        family = self.family
        prefix = family.blocks.partition(".")[0] + "."
        outside = prefix if family.head is None else (prefix, family.head + ".")
        name = stored_name if stored_name.startswith(outside) else prefix + stored_name
        if family.encoder is not None:
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        return name

    def piece_of(self, tensor_name: str) -> str | None:
        """Return the piece that holds a tensor of the full model.

        None for what no side needs: buffers that old checkpoints store, the second name of a
        tied embedding, and heads for another task.
        """
        family = self.family
        owner, _, leaf = tensor_name.rpartition(".")
        if owner in family.embeddings:
            return "embeddings"
        if owner == family.final_norm:
            return "final_norm"
        if owner == self.frozen_head:
            return None if self.tied_embeddings and not self.classifies else "head"
        if not tensor_name.startswith(family.blocks + "."):
            return None
        # Masks and rotary tables are buffers, stored by old versions of transformers.
        is_mask = owner.endswith(".attn") and leaf in ("bias", "masked_bias")
        if is_mask or leaf == "inv_freq":
            return None
        return f"block.{self.block_of(tensor_name)}"

    @property
    def frozen_head(self) -> str | None:
        """The path of the output projection, or of the pooler; None: a classifier without one."""
        return self.family.classifier.pooler if self.classifies else self.family.head

    def head_pieces(self) -> tuple[str, ...]:
        """Return the pieces that final norm, output projection (or pooler) and loss need."""
        norm = () if self.family.final_norm is None else ("final_norm",)
        if self.frozen_head is None:
            return norm
        tied = self.tied_embeddings and not self.classifies
        return (*norm, "embeddings" if tied else "head")

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

    def check_int8_blocks(self, blocks: int) -> None:
        """Raise PlanError where more blocks are to be held in 8 bits than the model has."""
        if blocks > self.block_count:
            raise PlanError(
                f"training.int8_blocks is {blocks}, but this model has {self.block_count} blocks: "
                f"choose at most {self.block_count}"
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


def _task(family: Family, training: TrainingChoices | None) -> tuple[Task, int]:
    """Return the task and its number of classes."""
    if training is None:
        return ("classification", 2) if family.causal_lm is None else ("causal-lm", 0)
    if training.task == "classification":
        if len(training.classes) < 2:
            raise ModelError("to classify takes two classes at least: name them, training.classes")
        return training.task, len(training.classes)
    if family.causal_lm is None:
        raise ModelError(
            f"a model of type {family.model_type!r} reads in both directions and writes no text: "
            "set training.task: classification and name the classes in training.classes"
        )
    return training.task, 0
