"""Build a Hugging Face model on torch's ``meta`` device and give memory to parts of it only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from shared.architecture import ModelArchitecture
from shared.errors import ModelError
from shared.int8_weights import SCALE, VALUES

Tensors: TypeAlias = Mapping[str, torch.Tensor] | Iterable[Path]
"""Base weights by full Hugging Face name, or safetensors files that hold them."""


def materialise(
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    modules: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
    architecture: ModelArchitecture | None = None,
) -> nn.Module:
    """Return the whole model's skeleton in which only ``modules`` hold anything.

    ``modules`` are paths of blocks, embeddings, final norm, head or rotary; any other of these
    is an empty `nn.Identity`. Only the tensors of ``modules`` are read from ``tensors``, and none
    of a classifier's: it is zero, float32 and trainable. ``architecture``: of the run's task;
    None: what ``config`` says by itself.

    Raises:
        ModelError: unsupported family; a tensor is missing or has another shape than the
            config says; a file is damaged.
    """
    architecture = architecture or ModelArchitecture.from_config(config)
    skeleton = empty_model(config, architecture)
    weights = as_mapping(tensors)
    for path in _piece_modules(architecture):
        if path not in modules:
            _put(skeleton, path, nn.Identity())
    rotary = architecture.family.rotary
    if rotary is not None and rotary in modules:
        # Its tables are computed, not stored, and on `meta` they have no values.
        table: Any = type(skeleton.get_submodule(rotary))
        _put(skeleton, rotary, table(config=skeleton.config).to(device))
    new = architecture.classifier_shapes()
    for name, parameter in list(skeleton.named_parameters()):
        if name in new:
            _hold(skeleton, name, nn.Parameter(torch.zeros(parameter.shape, device=device)))
            continue
        tensor = _read(weights, name)
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"weight {name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(parameter.shape)}: config and weights are not of the same model"
            )
        held = tensor.to(device=device, dtype=dtype)
        _hold(skeleton, name, nn.Parameter(held, requires_grad=False))
    return skeleton.eval()


class WeightFiles(Mapping[str, torch.Tensor]):
    """Several safetensors files as one mapping, read one tensor at a time.

    Each file is mapped into memory once: its tensors are views, read from disk when they are
    used. (Opened anew for each tensor, the pages between two of them would count twice.)
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the files' headers.

        Raises:
            ModelError: a file is missing or is no safetensors file.
        """
        self._file_of: dict[str, Any] = {}
        for file in files:
            opened = _open(file)
            self._file_of.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors."""
        return iter(self._file_of)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._file_of)


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"weights file {file} cannot be read: {error}") from error


def as_mapping(tensors: Tensors) -> Mapping[str, torch.Tensor]:
    """Return ``tensors`` if it is a mapping, or else its files as one."""
    return tensors if isinstance(tensors, Mapping) else WeightFiles(tensors)


def _read(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a weight; where it is stored in 8 bits, s q in float32 (`shared.int8_weights`)."""
    try:
        if name + VALUES in tensors:
            return tensors[name + VALUES].float().mul_(tensors[name + SCALE])
        return tensors[name]
    except KeyError:
        raise ModelError(f"weight {name} is missing from the base model's files") from None


def empty_model(config: Mapping[str, Any], architecture: ModelArchitecture) -> nn.Module:
    """Return the whole Hugging Face model on torch's ``meta`` device: shapes without memory."""
    parsed = transformers.CONFIG_MAPPING[architecture.family.model_type].from_dict(dict(config))
    if architecture.classifies:
        parsed.num_labels = architecture.class_count
    parsed._attn_implementation = "sdpa"  # noqa: SLF001 - Hugging Face has no public setter
    parsed.use_cache = False
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, architecture.model_class)(parsed)
    return model


def _piece_modules(architecture: ModelArchitecture) -> list[str]:
    family = architecture.family
    blocks = [architecture.block_path(j) for j in range(architecture.block_count)]
    classifier = family.classifier.module if architecture.classifies else None
    others = (family.rotary, family.final_norm, architecture.frozen_head, classifier)
    return [*blocks, *family.embeddings, *(path for path in others if path is not None)]


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _hold(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, parameter)
