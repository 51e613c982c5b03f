"""What a simulated run came to, so that two runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.adapters import Array
from shared.transport.memory import DEFAULT_MAX_PAYLOAD_BYTES, Faults
from tests.support.closeness import relative
from tests.support.simulation import Simulation

TRIO = {"a": 1, "b": 2, "c": 3}
"""Three devices and their split layers, in a model of four blocks."""


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
    """Return the largest relative difference of any module's update, or of the perplexity."""
    assert actual.updates.keys() == expected.updates.keys()
    apart = [relative(actual.updates[m], one) for m, one in expected.updates.items()]
    return max([*apart, abs(actual.perplexity / expected.perplexity - 1)])


def trio(
    folder: Path,
    *,
    model_folder: Path | None = None,
    labels: str = "device",
    hand_back: str = "residual",
    optimizer: str = "adamw",
    in_flight: int = 1,
    devices: Mapping[str, Any] | None = None,
    faults: Faults | None = None,
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
) -> Simulation:
    """Return a simulation of three unequal devices, not yet run: 2 rounds of 2 steps.

    Nobody is given up for being silent, unless ``devices`` (rules of the run) says so.
    """
    plans = {"a": {"r": 2}, "b": {"r": 4, "lora_alpha": 24.0}, "c": {"batch": 3}}
    sim = Simulation(
        folder,
        settings={
            "rounds": {"count": 2, "steps": 2},
            "plan": {
                "batch": 4,
                "micro_batch": 2,
                "in_flight": in_flight,
                "devices": {d: {"split_layer": k, **plans[d]} for d, k in TRIO.items()},
            },
            "lora": {"r": 8, "target_modules": ["c_attn", "c_fc"]},
            "devices": {"min": 3, "lost_after_s": 1e6, "step_timeout_s": 1e6, **(devices or {})},
            "optimizer": {
                "name": optimizer,
                "learning_rate": {"adamw": 1e-2, "sgd": 0.3}[optimizer],
            },
            "aggregation": {"hand_back": hand_back},
            "training": {"max_length": 48, "labels": labels, "wire_dtype": "float32"},
        },
        faults=faults,
        model_changes={"n_layer": 4},
        model_folder=model_folder,
        max_payload_bytes=max_payload_bytes,
    )
    for device in TRIO:
        sim.add_device(device, lines=12)
    return sim
