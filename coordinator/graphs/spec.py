"""What graphs are exported for, and under which key they are remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from shared import version
from shared.architecture import ModelArchitecture
from shared.graphs import block_kind
from shared.terms import LoraTerms, TrainingChoices

_FORMAT = "hsplit graphs 1"
"""Changed whenever other graphs would come out of the same spec and the same libraries."""

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """All that the graphs of a run depend on. ``config_json``: the base model's."""

    config_json: str
    training: TrainingChoices
    lora: LoraTerms

    def architecture(self) -> ModelArchitecture:
        """Return the model's architecture under the run's task.

        Raises:
            ModelError: as `ModelArchitecture.from_json`.
        """
        return ModelArchitecture.from_json(self.config_json, self.training)

    def sites(self) -> tuple[str, ...]:
        """Return the modules inside a block that have an adapter in any block, in order.

        Raises:
            PlanError: a target matches no module of the model.
        """
        architecture = self.architecture()
        modules = architecture.adaptable_modules(self.lora, blocks=range(architecture.block_count))
        found = {
            module.split(".", architecture.family.blocks.count(".") + 2)[-1] for module in modules
        }
        return tuple(name for name in architecture.linears if name in found)

    def first_of_kinds(self) -> Mapping[str, int]:
        """Return every kind of block that the model has, and the first block of it."""
        config, first_of = json.loads(self.config_json), dict[str, int]()
        for block in range(self.architecture().block_count):
            kind = block_kind(config, block, int8_blocks=self.training.int8_blocks)
            first_of.setdefault(kind, block)
        return first_of

    @property
    def has_dropout(self) -> bool:
        """Whether what goes into the trained pairs is dropped here and there in training."""
        return self.lora.lora_dropout > 0

    @property
    def key(self) -> str:
        """The SHA-256 of the spec and of the libraries that export: equal keys, equal graphs."""
        architecture = self.architecture()
        parts = {
            "format": _FORMAT,
            "hsplit": version.VERSION,
            "libraries": {name: metadata.version(name) for name in _LIBRARIES},
            "config": json.loads(self.config_json),
            "task": architecture.task,
            "classes": architecture.class_count,
            "head": self.training.labels == "device",
            "sites": self.sites(),
            "dropout": self.has_dropout,
            "kinds": tuple(self.first_of_kinds()),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
