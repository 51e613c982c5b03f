"""Three devices of a simulated run that measured themselves: their parts are planned."""

from __future__ import annotations

import json
from dataclasses import replace

from shared.architecture import ModelArchitecture
from shared.transport.memory import DEFAULT_MAX_PAYLOAD_BYTES
from tests.support.faults import Latency
from tests.support.fleets import Machine
from tests.support.graph_files import put_in_cache
from tests.support.outcomes import LINES, USUAL, backend_of
from tests.support.simulation import Simulation

SPEEDS = {"a": 1.0, "b": 0.5, "c": 0.2}


class Profiled:
    """Stands where a profiler does: says what a machine of this kind would have measured.

    ``asked``: what it was to measure; ``lies``: fields of which it says something else.
    """

    def __init__(self, machine):
        self._machine = machine
        self.asked = []
        self.lies = {}

    def pieces(self, request):
        return ("embeddings", "block.0")

    def measure(self, request, files):
        assert set(files) == {"embeddings", "block.0"}
        self.asked.append(request)
        architecture = ModelArchitecture.from_config(json.loads(request.config_json))
        return replace(self._machine.measured(architecture), **self.lies)


def add_measured(sim, name, machine, *, backend=None):
    """Start a device that is a machine of this kind."""
    device = sim.add_device(name, lines=LINES, backend=backend)
    device.parts = device.agent._parts = replace(device.parts, profiler=Profiled(machine))
    return device


def planned(
    folder,
    *,
    hand_back="residual",
    labels="device",
    rules=USUAL,
    faults=None,
    max_payload_bytes=DEFAULT_MAX_PAYLOAD_BYTES,
    without_torch="",
    **settings,
):
    """Return a simulation of three devices that measured themselves, not yet run.

    ``without_torch``: the devices that compute with onnx.
    """
    sim = Simulation(
        folder,
        settings={
            "rounds": {"count": 3, "steps": 2},
            "plan": {
                "batch": 4, "micro_batch": 2, "in_flight": 1, "probe_sequences": 3,
                "probe_every": 1,
            },
            "lora": {"r": 8, "target_modules": ["c_attn", "c_fc"]},
            "devices": {"expected": 3, "wait_s": 1e6, **rules},
            "optimizer": {"learning_rate": 1e-2},
            "aggregation": {"hand_back": hand_back},
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
            **settings,
        },
        faults=Latency() if faults is None else Latency(faults),
        model_changes={"n_layer": 4},
        max_payload_bytes=max_payload_bytes,
    )  # fmt: skip
    if without_torch:
        put_in_cache(sim.graphs)
    for name, speed in SPEEDS.items():
        add(sim, name, speed, backend=backend_of(name, without_torch))
    return sim


def add(sim, name, speed, *, backend=None):
    """Start a device of this speed."""
    return add_measured(sim, name, Machine(speed=speed), backend=backend)
