"""A tiny model whose first blocks are held in 8 bits, with the coordinator's own pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordinator.model_store import ModelStore
from shared.terms import TrainingChoices
from tests.support.simulation import write_model
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


def plain_model(family: str) -> TinyModel:
    """Return the model that `write_model` of tests.support.simulation writes."""
    return tiny_model(family, vocab_size=byte_level().get_vocab_size())


def int8_model(family: str, folder: Path, *, blocks: int) -> Int8Model:
    """Return that model with ``blocks`` of it in 8 bits."""
    training = TrainingChoices(int8_blocks=blocks)
    base = write_model(folder / "base", family)
    store = ModelStore.open(str(base), cache_folder=folder / "store", training=training)
    plain = plain_model(family)
    return Int8Model(plain.config, {**plain.tensors, **store.tensors()}, training, store)
