"""A backend of either kind that holds a part of a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from edge_agent.backends import open_backend
from edge_agent.backends.base import Backend, FrontBase
from shared.protocol.messages import DeviceId
from shared.terms import LabelMode, LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.graph_files import model_graphs
from tests.support.tiny_models import TinyModel

BackendName: TypeAlias = Literal["torch", "onnx"]
NANO = DeviceId("nano")
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


def loaded(
    name: BackendName,
    model: TinyModel,
    folder: Path,
    *,
    split_layer: int,
    training: TrainingTerms,
    lora: LoraTerms,
    optimizer: OptimizerTerms,
    device_id: DeviceId = NANO,
) -> Backend:
    """Return a backend with the first ``split_layer`` blocks, without adapters."""
    backend = open_backend(name, device="cpu", threads=1)
    backend.load(
        front_base(name, model, folder, split_layer=split_layer, lora=lora, labels=training.labels),
        device_id=device_id,
        training=training,
        lora=lora,
        optimizer=optimizer,
    )
    return backend


def front_base(
    name: BackendName,
    model: TinyModel,
    folder: Path,
    *,
    split_layer: int,
    lora: LoraTerms,
    labels: LabelMode = "device",
) -> FrontBase:
    """Write the pieces, and return what a device with this backend would hold."""
    base = model.front_base(folder, split_layer=split_layer, head=labels == "device")
    if name == "torch":
        return base
    return dataclasses.replace(base, graphs=model_graphs(model, dropout=lora.lora_dropout))
