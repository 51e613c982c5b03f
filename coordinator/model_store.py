"""The base model, cut into content-addressed pieces for the devices, and served byte by byte.

A piece is a safetensors file that exists nowhere: a header of ours, then byte ranges of the
checkpoint's own files, which are mapped into memory. So nothing is copied on disk, and only
the pieces' SHA-256 are remembered (a 14 GB model takes most of a minute to hash).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from coordinator import piece_content
from coordinator.int8_pieces import with_int8_blocks
from coordinator.model_folder import ModelFolder, find_model, read_texts, tokenizer_file
from coordinator.piece_content import PieceContent
from coordinator.piece_cutting import cut, identity, remembered_pieces
from coordinator.settings import CoordinatorSettings
from coordinator.stored_tensors import StoredTensors
from shared.architecture import ModelArchitecture
from shared.config import base_folder
from shared.protocol.messages import ModelDescription
from shared.terms import TrainingChoices
from shared.weight_files import open_tensors, weight_files


class ModelStore:
    """One base model: described and served to devices, and read by the server itself.

    One thread only. What is served is as stored: no dtype is changed, but for the blocks that a
    run holds in 8 bits.
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        cache_folder: Path,
        training: TrainingChoices | None = None,
    ) -> None:
        """Read a model's texts, find its tensors, and hash its pieces unless that is known.

        ``cache_folder`` keeps the hashes, and what is computed of a checkpoint, by the identity
        of its files. ``training``: the run's task, see `ModelArchitecture.from_config`, and how
        many blocks are held in 8 bits.

        Raises:
            ModelError: unsupported architecture, missing or damaged files, or weights that do
                not belong to ``config.json``.
            PlanError: more blocks are to be held in 8 bits than there are.
            StorageError: they cannot be written to the cache.
        """
        self.folder = folder
        self._texts = read_texts(folder)
        self.architecture = ModelArchitecture.from_config(self._texts.config, training)
        files = weight_files(folder.path)
        tokenizer = tokenizer_file(folder)
        held, int8_files = with_int8_blocks(
            cut(open_tensors(files), self.architecture, config=self.config),
            self.architecture,
            blocks=0 if training is None else training.int8_blocks,
            identity=identity(files),
            cache_folder=cache_folder,
        )
        self._held = held
        contents = {
            "tokenizer": PieceContent((memoryview(tokenizer.read_bytes()),)),
            **{name: PieceContent.of(held) for name, held in self._held.items()},
        }
        self._pieces = remembered_pieces(
            contents,
            of=[*files, *int8_files, tokenizer, folder.path / "config.json"],
            cache_folder=cache_folder,
        )
        self._by_sha256 = {piece.sha256: contents[piece.name] for piece in self._pieces}

    @classmethod
    def of(cls, settings: CoordinatorSettings) -> ModelStore:
        """Return the store of a run's model; the user's cache keeps its hashes.

        Raises:
            ModelError: as `find_model` and the constructor.
        """
        return cls.open(
            settings.model.name,
            revision=settings.model.revision,
            cache_folder=base_folder("XDG_CACHE_HOME", "~/.cache") / "hsplit" / "pieces",
            training=settings.training,
        )

    @classmethod
    def open(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        cache_folder: Path,
        training: TrainingChoices | None = None,
    ) -> ModelStore:
        """Return the store of a model, by folder or by hub name.

        Raises:
            ModelError: as `find_model` and the constructor.
        """
        found = find_model(name_or_path, revision=revision)
        return cls(found, cache_folder=cache_folder, training=training)

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed ``config.json``."""
        return self._texts.config

    @property
    def fingerprint(self) -> str:
        """One SHA-256 over all pieces: the same for the same weights and tokenizer."""
        names = sorted(f"{piece.name} {piece.sha256}" for piece in self._pieces)
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def describe(self) -> ModelDescription:
        """Return what devices must know of the model."""
        return ModelDescription(
            name=self.folder.name,
            config_json=self._texts.config_json,
            pieces=self._pieces,
            chat_template=self._texts.chat_template,
            eos_token_id=self._texts.eos_token_id,
            special_tokens=dict(self._texts.special_tokens),
        )

    def read(self, sha256: str, *, offset: int, length: int) -> memoryview:
        """Return bytes of a piece.

        Raises:
            ProtocolError: no such piece, or the range is not inside it.
        """
        return piece_content.read(self._by_sha256, sha256, offset=offset, length=length)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the model's tensors by full Hugging Face name, each read when it is asked for.

        In the dtype they are stored in; what devices hold in 8 bits in float32, with the same
        values. A tied output projection is not among them.
        """
        return StoredTensors({n: t for held in self._held.values() for n, t in held.items()})
