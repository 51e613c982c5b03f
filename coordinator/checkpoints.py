"""The state of a run after each round, on disk: safetensors and JSON, no pickle.

``checkpoints/round-000012/`` holds::

    update.safetensors      the global update, factored, in float64
    server.safetensors      the server's adapters at the start of the next round, float32
    optimizer.safetensors   the state of the server's optimizer
    classifier.safetensors  the weights of the classifier, float32; only where there is one
    state.json              round, step, and whatever the coordinator needs besides
    manifest.json           SHA-256 of each of these

A folder appears whole or not at all; one that was damaged later does not match its manifest,
and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from coordinator.aggregation import GlobalUpdate, ModuleUpdate, Sole
from coordinator.atomic_folder import replacing
from shared.adapters import FactoredDelta, HeldAdapters, LoraPair, ModuleAdapter
from shared.classifier_weights import ClassifierTensors
from shared.errors import StorageError

logger = logging.getLogger(__name__)

Tensors: TypeAlias = dict[str, npt.NDArray[Any]]
Json: TypeAlias = Any
"""Whatever `json` can write and read back unchanged."""

FORMAT = 1
_UPDATE, _SERVER, _OPTIMIZER = "update.safetensors", "server.safetensors", "optimizer.safetensors"
_CLASSIFIER = "classifier.safetensors"
_STATE, _MANIFEST = "state.json", "manifest.json"
_FILES = (_UPDATE, _SERVER, _OPTIMIZER, _STATE)
_NAME = re.compile(r"round-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """What the coordinator needs to go on after ``round`` aggregated rounds and ``step`` steps.

    ``update`` and ``server`` belong to the start of the next round, after its hand-back.
    ``optimizer``: arrays by name. ``classifier``: its weights, empty where there is none.
    ``state``: plan, tallies and so on, by name.
    """

    round: int
    step: int
    update: GlobalUpdate
    server: HeldAdapters
    optimizer: Mapping[str, npt.NDArray[Any]]
    state: Mapping[str, Json]
    classifier: ClassifierTensors = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``checkpoint`` under ``folder``, remove all but the newest ``keep``, return its path.

    A checkpoint of the same round is replaced; those of later rounds, which a resumed run
    left behind as damaged, are removed.

    Raises:
        StorageError: the disk is full or the folder cannot be written; older ones remain.
    """
    target = folder / f"round-{checkpoint.round:06d}"
    update, sole = _update_tensors(checkpoint.update)
    state = {
        "format": FORMAT,
        "round": checkpoint.round,
        "step": checkpoint.step,
        "sole": sole,
        "state": dict(checkpoint.state),
    }
    contents = {
        _UPDATE: _save_tensors(update),
        _SERVER: _save_tensors(_server_tensors(checkpoint.server)),
        _OPTIMIZER: _save_tensors(checkpoint.optimizer),
        _STATE: _to_json(state),
    }
    if checkpoint.classifier:
        contents[_CLASSIFIER] = _save_tensors(checkpoint.classifier)
    contents[_MANIFEST] = _to_json({name: _sha256(data) for name, data in contents.items()})
    with replacing(target) as fresh:
        for name, data in contents.items():
            (fresh / name).write_bytes(data)
    _prune(folder, newest=checkpoint.round, keep=keep)
    return target


def load(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder ``path``.

    Raises:
        StorageError: a file is missing or damaged, or another version of hsplit wrote it.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        files = (*_FILES, _CLASSIFIER) if _CLASSIFIER in manifest else _FILES
        contents = {name: (path / name).read_bytes() for name in files}
        damaged = [name for name, data in contents.items() if manifest[name] != _sha256(data)]
        if damaged:
            raise StorageError(f"checkpoint {path}: {', '.join(damaged)} is damaged")
        return _decode(path, contents)
    except OSError as error:
        raise StorageError(f"checkpoint {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise StorageError(f"checkpoint {path} cannot be read: {error}") from error


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint under ``folder`` that is whole; None where there is none.

    Damaged ones are passed over with a warning.
    """
    for _, path in sorted(_numbered(folder), reverse=True):
        try:
            return load(path)
        except StorageError as error:
            logger.warning("%s; going back to the one before it", error)
    return None


def _decode(path: Path, contents: Mapping[str, bytes]) -> Checkpoint:
    state = json.loads(contents[_STATE])
    if state["format"] != FORMAT:
        raise StorageError(
            f"checkpoint {path} is of format {state['format']}, this hsplit reads {FORMAT}; "
            "resume it with the version that wrote it"
        )
    if not isinstance(state["state"], dict):
        raise StorageError(f"checkpoint {path}: its state is no object")
    return Checkpoint(
        round=state["round"],
        step=state["step"],
        update=_read_update(load_tensors(contents[_UPDATE]), state["sole"]),
        server=_read_server(load_tensors(contents[_SERVER])),
        optimizer=load_tensors(contents[_OPTIMIZER]),
        state=state["state"],
        classifier=load_tensors(contents[_CLASSIFIER]) if _CLASSIFIER in contents else {},
    )


def _update_tensors(update: GlobalUpdate) -> tuple[Tensors, dict[str, Json]]:
    """Return the arrays of ``update`` and, for JSON, its sole holders.

    ``handed`` is written only where it is not ``total`` itself, which is the rule.
    """
    tensors: Tensors = {}
    for module, one in update.items():
        tensors.update(_delta_tensors(f"{module}:total", one.total))
        if one.handed is not one.total:
            tensors.update(_delta_tensors(f"{module}:handed", one.handed))
        if one.pair is not None:
            tensors.update(_pair_tensors(f"{module}:pair", one.pair))
    sole = {m: one.sole._asdict() for m, one in update.items() if one.sole is not None}
    return tensors, sole


def _read_update(tensors: Tensors, sole: Mapping[str, Json]) -> GlobalUpdate:
    update = {}
    for module in _modules(tensors):
        total = _read_delta(tensors, f"{module}:total")
        lags = f"{module}:handed:s" in tensors
        handed = _read_delta(tensors, f"{module}:handed") if lags else total
        holder = Sole(**sole[module]) if module in sole else None
        pair = _read_pair(tensors, f"{module}:pair") if f"{module}:pair:a" in tensors else None
        update[module] = ModuleUpdate(total, handed, holder, pair)
    return update


def _delta_tensors(name: str, delta: FactoredDelta) -> Tensors:
    return {f"{name}:u": delta.u_OR, f"{name}:s": delta.s_R, f"{name}:vt": delta.vt_RI}


def _read_delta(tensors: Tensors, name: str) -> FactoredDelta:
    return FactoredDelta(tensors[f"{name}:u"], tensors[f"{name}:s"], tensors[f"{name}:vt"])


def _server_tensors(server: HeldAdapters) -> Tensors:
    tensors: Tensors = {}
    for module, adapter in server.items():
        tensors.update(_pair_tensors(f"{module}:trainable", adapter.trainable))
        if adapter.frozen is not None:
            tensors.update(_pair_tensors(f"{module}:frozen", adapter.frozen))
    return tensors


def _read_server(tensors: Tensors) -> HeldAdapters:
    return {
        module: ModuleAdapter(
            _read_pair(tensors, f"{module}:trainable"),
            _read_pair(tensors, f"{module}:frozen") if f"{module}:frozen:a" in tensors else None,
        )
        for module in _modules(tensors)
    }


def _pair_tensors(name: str, pair: LoraPair) -> Tensors:
    scaling = np.array(pair.scaling, dtype=np.float64)
    return {f"{name}:a": pair.a_RI, f"{name}:b": pair.b_OR, f"{name}:scaling": scaling}


def _read_pair(tensors: Tensors, name: str) -> LoraPair:
    scaling = float(tensors[f"{name}:scaling"])
    return LoraPair(tensors[f"{name}:a"], tensors[f"{name}:b"], scaling)


def _modules(tensors: Tensors) -> list[str]:
    return sorted({name.partition(":")[0] for name in tensors})


def _save_tensors(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    # safetensors writes an array's memory as it lies, so it must lie in C order. Not
    # np.ascontiguousarray, which makes a vector of a scalar.
    return save_tensors({name: np.asarray(array, order="C") for name, array in tensors.items()})


def _to_json(value: Json) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    matches = [(_NAME.fullmatch(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    return [(int(match.group(1)), path) for match, path in matches if match]


def _prune(folder: Path, *, newest: int, keep: int) -> None:
    """Remove checkpoints that are too old, or newer than the one just written."""
    numbered = sorted(_numbered(folder), reverse=True)
    good = [path for number, path in numbered if number <= newest]
    for path in [p for n, p in numbered if n > newest] + good[max(1, keep) :]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning(
                "cannot remove the old checkpoint %s: %s; remove it by hand", path, error
            )
