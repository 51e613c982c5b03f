"""A tiny model whose first blocks are held in 8 bits, with the coordinator's own pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from coordinator.model_store import ModelStore
from shared.terms import TrainingChoices
from tests.support.tiny_models import TinyModel, tiny_model
from tests.support.vocabularies import byte_level


@dataclass(frozen=True)
class Int8Model(TinyModel):
    """``tensors`` are what the coordinator computes with, pieces what it serves."""

    store: ModelStore | None = None

    def write_pieces(self, folder: Path) -> dict[str, Path]:
        """Write each piece as a device gets it; return the files by piece name."""
        assert self.store is not None
        files = {}
        for piece in self.store.describe().pieces:
            files[piece.name] = folder / f"{piece.name}.safetensors"
            content = self.store.read(piece.sha256, offset=0, length=piece.size_bytes)
            files[piece.name].write_bytes(content)
        return files


def write_checkpoint(folder: Path, family: str) -> Path:
    """Write a tiny model as a hub would hold it."""
    model = tiny_model(family)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    copies = {name: tensor.clone().contiguous() for name, tensor in model.tensors.items()}
    save_file(copies, folder / "model.safetensors")
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


def int8_model(family: str, folder: Path, *, blocks: int) -> Int8Model:
    """Return a tiny model of ``family``, ``blocks`` of it in 8 bits."""
    training = TrainingChoices(int8_blocks=blocks)
    base = write_checkpoint(folder / "base", family)
    store = ModelStore.open(str(base), cache_folder=folder / "store", training=training)
    plain = tiny_model(family)
    return Int8Model(plain.config, {**plain.tensors, **store.tensors()}, training, store)
