"""A model on this machine's disk or on the hub, as the pieces that a backend loads.

In a run a device gets its pieces from the coordinator; this is for measuring without a run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared import hub
from shared.architecture import ModelArchitecture
from shared.errors import ModelError, StorageError
from shared.weight_files import (
    INDEX,
    StoredTensor,
    file_names,
    header,
    in_file_order,
    open_tensors,
    weight_files,
)

logger = logging.getLogger(__name__)

SETTING = "--model"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A base model by folder; ``hub_name`` where its weights may have to be fetched first."""

    name: str
    folder: Path
    config_json: str
    architecture: ModelArchitecture
    hub_name: str | None = None

    def piece_files(self, names: Collection[str], *, scratch: Path) -> dict[str, Path]:
        """Return a safetensors file for each of these pieces.

        The model's own files where they will do; a piece that lies in several files, or under
        other names than the backend's, is copied into the folder ``scratch``.

        Raises:
            ModelError: weights are missing or damaged, or cannot be fetched.
            StorageError: ``scratch`` cannot be written.
        """

        def wanted(stored_name: str) -> bool:
            return self._piece_of(stored_name) in names

        if self.hub_name is not None:
            files = file_names(self.folder, wanted)
            hub.fetch(self.hub_name, files=files, revision=self.folder.name, setting=SETTING)
        pieces: dict[str, dict[str, StoredTensor]] = {name: {} for name in names}
        for stored_name, tensor in open_tensors(weight_files(self.folder, wanted)).items():
            piece = self._piece_of(stored_name)
            if piece in pieces:
                pieces[piece][self.architecture.full_name(stored_name)] = tensor
        return {name: _file_of(name, held, self.folder, scratch) for name, held in pieces.items()}

    def _piece_of(self, stored_name: str) -> str | None:
        try:
            return self.architecture.piece_of(self.architecture.full_name(stored_name))
        except ModelError:  # a block that config.json does not have
            return None


def open_model(name_or_path: str) -> LocalModel:
    """Return a model by folder or by hub name; of the hub only its configuration is fetched.

    Raises:
        ModelError: it is not there, is damaged, or its architecture is not supported.
        ConfigError: it is no folder, and the hub's library is not installed.
    """
    folder, hub_name = Path(name_or_path).expanduser(), None
    if not folder.is_dir():
        if not hub.is_hub_name(name_or_path):
            raise ModelError(f"model {name_or_path}: no such folder; check {SETTING}")
        hub_name = name_or_path
        folder = hub.fetch(hub_name, files=(CONFIG, INDEX), revision=None, setting=SETTING)
    config_json = _read_config(folder)
    return LocalModel(
        name=hub_name or folder.resolve().name,
        folder=folder,
        config_json=config_json,
        architecture=_architecture(folder, config_json),
        hub_name=hub_name,
    )


def _read_config(folder: Path) -> str:
    try:
        return (folder / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder}: {CONFIG} is missing; is this a Hugging Face model? Check {SETTING}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read: {error}") from error


def _architecture(folder: Path, config_json: str) -> ModelArchitecture:
    try:
        config = json.loads(config_json)
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON: {error}; fetch it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / CONFIG} is not a JSON object; fetch it again")
    return ModelArchitecture.from_config(config)


def _file_of(piece: str, held: Mapping[str, StoredTensor], folder: Path, scratch: Path) -> Path:
    if not held:
        raise ModelError(f"{folder}: the weights lack piece {piece}; is the model complete?")
    files = {tensor.file for tensor in held.values()}
    if len(files) == 1 and all(name == tensor.stored_name for name, tensor in held.items()):
        return files.pop()
    path = scratch / f"{piece}.safetensors"
    logger.debug("copying piece %s of %s to %s", piece, folder, path)
    try:
        with path.open("wb") as file:
            ordered = in_file_order(held)
            file.write(header(ordered))
            for tensor in ordered.values():
                file.write(tensor.data)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}; free some space, or choose another "
            "cache_folder"
        ) from error
    return path
