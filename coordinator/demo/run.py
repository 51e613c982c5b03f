"""``hsplit-coordinator demo``: broker, coordinator and three unequal agents on this machine."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from coordinator import demo as material
from coordinator import program
from coordinator.demo import agents
from coordinator.embedded_broker import EmbeddedBroker
from coordinator.metrics import Summary
from coordinator.planning.device_plan import ranks_in_short
from coordinator.settings import (
    CoordinatorSettings,
    DeviceOverrides,
    DeviceRules,
    ModelSettings,
    PlanSettings,
    RoundSettings,
    RunSettings,
)
from shared.clock import Clock
from shared.config import BrokerSettings
from shared.protocol.messages import DeviceId
from shared.terms import LabelMode, LoraTerms, OptimizerTerms, TrainingChoices

logger = logging.getLogger(__name__)

RANKS = {
    DeviceId("workstation"): DeviceOverrides(r=16, lora_alpha=32.0),
    DeviceId("laptop"): DeviceOverrides(r=8, lora_alpha=16.0),
    DeviceId("nano"): DeviceOverrides(r=4, lora_alpha=8.0),
}
"""How many adapter parameters each may have; where they go, and all else, is planned."""
BATCH = 8
"""Sequences of a device in each step, on average."""

ROUNDS = 4
STEPS = 30


def settings(
    folder: Path, broker_url: str, *, labels: LabelMode, rounds: int | None
) -> CoordinatorSettings:
    """Return the demo's run: what a ``run.yaml`` would say."""
    return CoordinatorSettings(
        run=RunSettings(folder=folder),
        model=ModelSettings(name=str(material.base_folder())),
        broker=BrokerSettings(url=broker_url),
        devices=DeviceRules(min=len(RANKS), expected=len(RANKS), join_timeout_s=180),
        plan=PlanSettings(batch=BATCH, devices=RANKS),
        rounds=RoundSettings(count=rounds or ROUNDS, steps=STEPS),
        lora=LoraTerms(r=16, lora_alpha=32.0, target_modules=("c_attn", "c_proj", "c_fc")),
        optimizer=OptimizerTerms(
            learning_rate=5e-3, warmup_steps=5, schedule="cosine", min_learning_rate_ratio=0.1
        ),
        training=TrainingChoices(labels=labels, max_length=256),
        threads=1,
        device="cpu",
    )


def demo(folder: Path, clock: Clock, *, labels: LabelMode, rounds: int | None) -> Summary:
    """Carry out the demo, print what it did, and return its summary.

    Raises:
        HsplitError: something could not start, or an agent failed.
    """
    with EmbeddedBroker() as broker:
        wanted = settings(folder, broker.url, labels=labels, rounds=rounds)
        wanted = wanted.with_run_id(clock.wall_s())
        print(f"broker: embedded {broker.kind} at {broker.url}; run folder: {wanted.run_folder}")
        print(f"agents write their logs to {wanted.run_folder / 'agents'}")
        with agents.running(wanted.run_folder / "agents", broker.url, labels=labels):
            summary = program.run(wanted, clock, resume=False)
    print(table(summary, wanted.run_folder))
    return summary


def table(summary: Summary, run_folder: Path) -> str:
    """Return the outcome for people."""
    rows = [f"{'device':<14}{'split layer':>12}{'LoRA rank':>24}{'target tokens':>15}"]
    rows += [
        f"{name:<14}{one.split_layer:>12}{ranks_in_short(one.ranks):>24}{one.target_tokens:>15,}"
        for name, one in summary.devices.items()
    ]
    return "\n".join(
        (
            "",
            *rows,
            "",
            (
                f"held-out perplexity {summary.perplexity_before or math.nan:.1f} -> "
                f"{summary.perplexity_after or math.nan:.2f} in {summary.steps} steps, "
                f"{summary.seconds:.0f} s"
            ),
            (
                f"over the broker: {summary.bytes_up / 1e6:.1f} MB up, "
                f"{summary.bytes_down / 1e6:.1f} MB down"
            ),
            f"adapter: {run_folder / program.ADAPTER}   (PeftModel.from_pretrained opens it)",
        )
    )
