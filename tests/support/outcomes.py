"""Three unequal devices in a simulated run, and what it came to, so that runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.backends import open_backend
from edge_agent.backends.base import Backend
from shared.adapters import Array
from shared.transport.memory import DEFAULT_MAX_PAYLOAD_BYTES, Faults
from tests.support.closeness import largest, relative
from tests.support.faults import Latency
from tests.support.graph_files import put_in_cache
from tests.support.simulation import Simulation

TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
LEARNING_RATE = {"sgd": 0.3, "adamw": 1e-2}
PLANS: Mapping[str, Mapping[str, Any]] = {
    "a": {"split_layer": 1, "r": 2},
    "b": {"split_layer": 2, "r": 4, "lora_alpha": 24.0},
    "c": {"split_layer": 3, "batch": 3},
}
"""Of a model of four blocks; another batch, rank, scaling and split layer for each."""
LINES = 12
PATIENT = {"min": 3, "lost_after_s": 1e6, "step_timeout_s": 1e6, "late_after_s": 1e6}
"""Rules of a run that gives nobody up."""
USUAL = {"min": 3, "lost_after_s": 6.0, "step_timeout_s": 300.0}


@dataclass(frozen=True)
class Outcome:
    """``updates``: the dense global update of every module, (out, in) float64.

    ``losses``: the training loss of each step as it was reported; ``perplexity``: held out,
    after the last round; ``tokens``: target tokens that each device contributed.
    """

    updates: Mapping[str, Array]
    losses: tuple[float, ...]
    perplexity: float
    tokens: Mapping[str, int]


def outcome_of(sim: Simulation) -> Outcome:
    """Return what a finished run came to."""
    summary = sim.reporter.summary()
    assert summary.perplexity_after is not None
    return Outcome(
        {module: one.total.delta_OI() for module, one in sim.model.update.items()},
        tuple(line["train/loss"] for line in sim.metrics() if "train/loss" in line),
        summary.perplexity_after,
        {device: one.target_tokens for device, one in summary.devices.items()},
    )


def difference(actual: Outcome, expected: Outcome) -> float:
    """Return the largest relative difference of any module's update, or of the perplexity.

    The tokens that counted must be the same ones.
    """
    assert actual.tokens == expected.tokens
    assert actual.updates.keys() == expected.updates.keys()
    apart = [relative(actual.updates[m], one) for m, one in expected.updates.items()]
    return largest([*apart, abs(actual.perplexity / expected.perplexity - 1)])


def trio(
    folder: Path,
    *,
    labels: str = "device",
    hand_back: str = "residual",
    optimizer: str = "adamw",
    micro_batch: int = 2,
    in_flight: int = 1,
    rounds: int = 2,
    rules: Mapping[str, Any] = USUAL,
    faults: Faults | None = None,
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
    devices: str = "abc",
    plans: Mapping[str, Mapping[str, Any]] = PLANS,
    outlier_factor: float | None = 10.0,
    without_torch: str = "",
) -> Simulation:
    """Return a simulation of three unequal devices, not yet run: rounds of 2 steps.

    Every parcel takes a while, and ``faults`` come on top of that. ``without_torch``: the devices
    that compute with onnx.
    """
    sim = Simulation(
        folder,
        settings={
            "rounds": {"count": rounds, "steps": 2},
            "plan": {
                "batch": 4,
                "micro_batch": micro_batch,
                "in_flight": in_flight,
                "devices": plans,
            },
            "lora": {"r": 8, "target_modules": ["c_attn", "c_fc"]},
            "devices": rules,
            "optimizer": {"name": optimizer, "learning_rate": LEARNING_RATE[optimizer]},
            "aggregation": {"hand_back": hand_back, "outlier_factor": outlier_factor},
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
        },
        faults=Latency() if faults is None else Latency(faults),
        model_changes={"n_layer": 4},
        max_payload_bytes=max_payload_bytes,
    )
    if without_torch:
        put_in_cache(sim.graphs)
    for device in devices:
        sim.add_device(device, lines=LINES, backend=backend_of(device, without_torch))
    return sim


def backend_of(device: str, without_torch: str) -> Backend | None:
    """Return onnx for a device that is ``without_torch``, None for others: a simulation's own."""
    return open_backend("onnx", device="cpu", threads=1) if device in without_torch else None
