"""``hsplit-coordinator demo``: broker, coordinator and three unequal agents on this machine."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from coordinator import demo as material
from coordinator import program, strategies
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
RANK = 8
"""Of everybody, where the strategy wants equal ranks."""
BATCH = 8
"""Sequences of a device in each step, on average."""

ROUNDS = 4
STEPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a person may choose. ``rounds``: None for `ROUNDS`."""

    labels: LabelMode = "device"
    rounds: int | None = None
    strategy: str = "hsplitlora"


def settings(folder: Path, broker_url: str, wanted: Wanted) -> CoordinatorSettings:
    """Return the demo's run: what a ``run.yaml`` would say.

    Raises:
        ConfigError: there is no such strategy.
    """
    strategy = strategies.named(wanted.strategy)
    alike = strategies.STRATEGIES[strategy].ranks == "one"
    rank = RANK if alike else max(own.r or 0 for own in RANKS.values())
    return CoordinatorSettings(
        run=RunSettings(folder=folder),
        strategy=strategy,
        model=ModelSettings(name=str(material.base_folder())),
        broker=BrokerSettings(url=broker_url),
        devices=DeviceRules(min=len(RANKS), expected=len(RANKS), join_timeout_s=180),
        plan=PlanSettings(batch=BATCH, devices={} if alike else RANKS),
        rounds=RoundSettings(count=wanted.rounds or ROUNDS, steps=STEPS),
        lora=LoraTerms(r=rank, lora_alpha=2.0 * rank, target_modules=("c_attn", "c_proj", "c_fc")),
        optimizer=OptimizerTerms(
            learning_rate=5e-3, warmup_steps=5, schedule="cosine", min_learning_rate_ratio=0.1
        ),
        training=TrainingChoices(labels=wanted.labels, max_length=256),
        threads=1,
        device="cpu",
    )


def demo(folder: Path, clock: Clock, wanted: Wanted) -> Summary:
    """Carry out the demo, print what it did, and return its summary.

    Raises:
        HsplitError: something could not start, or an agent failed.
    """
    strategies.named(wanted.strategy)  # before anything is started
    with EmbeddedBroker() as broker:
        run = settings(folder, broker.url, wanted).with_run_id(clock.wall_s())
        print(f"broker: embedded {broker.kind} at {broker.url}; run folder: {run.run_folder}")
        print(f"agents write their logs to {run.run_folder / 'agents'}")
        with agents.running(run.run_folder / "agents", broker.url, labels=wanted.labels):
            summary = program.run(run, clock, resume=False)
    print(table(summary, run.run_folder))
    return summary


def table(summary: Summary, run_folder: Path) -> str:
    """Return the outcome for people."""
    backends = {shard.device: shard.backend for shard in material.shards()}
    rows = [_row("device", "backend", "split layer", "LoRA rank", "target tokens")]
    rows += [
        _row(
            name,
            backends[name],
            str(one.split_layer),
            ranks_in_short(one.ranks),
            f"{one.target_tokens:,}",
        )
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


def _row(*cells: str) -> str:
    device, backend, split_layer, ranks, tokens = cells
    return f"{device:<14}{backend:<8}{split_layer:>12}{ranks:>24}{tokens:>15}"
