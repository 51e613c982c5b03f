"""Adapters on the shipped base, written by the coordinator's own export."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import PeftModel

from coordinator import demo
from coordinator.aggregation import GlobalUpdate, ModuleUpdate
from coordinator.export import export_adapter
from coordinator.factoring import Term, recompress
from coordinator.model_card import ModelCard
from tests.testbed import small_run

CARD = ModelCard(
    base_model="tiny",
    run_id="run-1",
    strategy="hsplitlora",
    hand_back="residual",
    labels="device",
    rounds=1,
    steps=1,
    devices=(),
)
_SHAPES = {"attn.c_attn": (576, 192), "mlp.c_fc": (768, 192)}


def write_adapter(folder: Path, *, base: Path | None = None, blocks: int = 6) -> Path:
    """Write a random adapter of rank 2 that changes what the shipped base says."""
    name = str(base or demo.base_folder())
    return export_adapter(_update(blocks), name, folder, card=CARD)


def write_run(folder: Path, *, max_length: int = 128) -> Path:
    """Write what `evaluate` reads of a finished run: its settings and its adapter."""
    folder.mkdir(parents=True)
    settings = small_run.settings(training={"max_length": max_length})
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    write_adapter(folder / "adapter")
    return folder


def opened_with_peft(adapter: Path) -> torch.nn.Module:
    """Return the adapter on the base as any user of PEFT opens it."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that is going away; neither is ours.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(small_run.plain_model(), str(adapter)).eval()


def _update(blocks: int) -> GlobalUpdate:
    random = np.random.default_rng(0)
    update = {}
    for block in range(blocks):
        for module, (out_features, in_features) in _SHAPES.items():
            term = Term(
                0.01 * random.standard_normal((out_features, 2)),
                random.standard_normal((2, in_features)),
            )
            shape = (out_features, in_features)
            total = recompress([term], shape=shape, tolerance=1e-6).delta
            update[f"transformer.h.{block}.{module}"] = ModuleUpdate(total, total)
    return update
