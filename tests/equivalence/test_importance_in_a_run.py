"""Importance through every message of a run: what devices and server measured together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from coordinator.fleet import Observations
from coordinator.importance import theta
from tests.support.dense_importance import dense_importance
from tests.support.simulation import Simulation
from tests.support.tiny_models import TinyModel

TARGETS = ("q_proj", "down_proj")
SPLIT_LAYERS = {"nano": 1, "orin": 2}
SEQUENCES, MICRO_BATCH = 5, 2


class Run:
    """A run of three devices, one of them planned, and what was observed of each round."""

    def __init__(self, folder, *, probe_sequences=SEQUENCES, labels="device", lora_dropout=0.0):
        self.folder = folder
        devices = {name: {"split_layer": split} for name, split in SPLIT_LAYERS.items()}
        self.sim = Simulation(
            folder,
            "llama",
            settings={
                "rounds": {"count": 2, "steps": 2},
                "plan": {
                    "batch": 3,
                    "micro_batch": MICRO_BATCH,
                    "probe_sequences": probe_sequences,
                    "probe_every": 1,
                    "adapt": False,
                    "devices": devices,
                },
                "devices": {"min": 3},
                "lora": {"r": 4, "target_modules": TARGETS, "lora_dropout": lora_dropout},
                "optimizer": {"learning_rate": 3e-3},
                "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
            },
        )
        self.seen: list[Observations] = []
        observe = self.sim.fleet.observe
        self.sim.fleet.observe = lambda seen: self.seen.append(seen) or observe(seen)
        for name in (*SPLIT_LAYERS, "pi"):
            self.sim.add_device(name)
        self.sim.run()

    def dense(self):
        """Return what dense gradients say of the base, on the sequences that were to be probed."""
        base = self.folder / "base"
        config = json.loads((base / "config.json").read_text())
        model = TinyModel(config, load_file(base / "model.safetensors"))
        total, tokens = {}, 0
        for device in self.sim.devices.values():
            data = device.agent._participation._data
            batches = data.micro_batches(0, batch=SEQUENCES, micro_batch=MICRO_BATCH)
            tokens += sum(batch.target_tokens for batch in batches)
            for module, value in dense_importance(model, {}, batches).items():
                if module.endswith(TARGETS):
                    total[module] = total.get(module, 0.0) + value
        return {module: value / tokens for module, value in total.items()}


@pytest.mark.parametrize("labels", ["device", "server"])
def test_devices_and_server_together_measure_what_dense_gradients_say(labels, tmp_path):
    run = Run(tmp_path, labels=labels)
    first = run.seen[0].importance
    assert len(first) == 4, "three devices and the server"
    # In the first round B is zero, so the weights are the base's.
    assert theta(first) == pytest.approx(run.dense(), rel=1e-5)
    assert theta(run.seen[1].importance) != theta(first), "the weights moved on"
    scores = run.sim.fleet.importance.scores
    assert scores.keys() == theta(first).keys()


def test_a_run_with_probes_learns_what_one_without_learns(tmp_path):
    probed, plain = (
        Run(tmp_path / str(count), probe_sequences=count, lora_dropout=0.2) for count in (5, 0)
    )
    assert probed.sim.fleet.importance.scores
    assert not plain.sim.fleet.importance.scores
    assert plain.sim.model.update.keys() == probed.sim.model.update.keys() != set()
    for module, update in plain.sim.model.update.items():
        learnt = probed.sim.model.update[module].total
        np.testing.assert_array_equal(
            learnt.u_OR * learnt.s_R, update.total.u_OR * update.total.s_R
        )
        np.testing.assert_array_equal(learnt.vt_RI, update.total.vt_RI)
