"""Run folders as a coordinator leaves them, written by its own writers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from coordinator.journal import Journal
from coordinator.metrics import DeviceSummary, MetricsWriter, Summary
from shared.protocol.messages import DeviceId
from tests.support.fake_clock import FakeClock

KINDS = ("attn.c_attn", "mlp.c_fc")
BLOCKS = 14
STEP_S = 2.0
ROUND_REST_S = 3.0
"""What a round takes beside its steps."""


def write_run(
    folder: Path,
    *,
    devices: Sequence[str] = ("laptop", "nano"),
    rounds: int = 3,
    steps: int = 4,
    reason: str = "memory allows 5, but the link makes 3 faster",
    finished: bool = True,
) -> None:
    """Write a run of ``rounds`` rounds; a new plan and new importance before each."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = FakeClock()
    (folder / "run.yaml").write_text(
        "run: {id: my-run}\nstrategy: hsplitlora\nmodel: {name: org/tiny}\n"
        f"rounds: {{count: 3, steps: {steps}}}\n"
    )
    with (
        contextlib.closing(Journal(folder, clock)) as journal,
        contextlib.closing(MetricsWriter(folder, clock, tensorboard=False)) as writer,
    ):
        writer.write(_evaluated(100.0, devices), round_=0, step=0)
        for number in range(1, rounds + 1):
            step = (number - 1) * steps
            _plan(journal, number, step, devices=devices, reason=reason)
            journal.importance(number, step, _scores(number))
            _train(writer, clock, number, devices=devices, steps=steps)
            writer.write(_evaluated(100.0 / number, devices), round_=number, step=number * steps)
    if finished:
        _summary(rounds * steps, devices).save(folder)


def modules(blocks: range) -> list[str]:
    """Return the module paths of some blocks."""
    return [f"transformer.h.{block}.{kind}" for block in blocks for kind in KINDS]


def _scores(number: int) -> dict[str, float]:
    return {module: 0.1 * number * (i + 1) for i, module in enumerate(modules(range(BLOCKS)))}


def _plan(journal: Journal, number: int, step: int, *, devices: Sequence[str], reason: str) -> None:
    journal.plan(
        number,
        step,
        predicted_step_s=STEP_S / 2,
        devices={
            device: {
                "split_layer": number,
                "batch": 8,
                "micro_batch": 4,
                "in_flight": 2,
                "ranks": dict.fromkeys(modules(range(number)), 4),
                "reason": reason,
                "predicted_step_s": STEP_S / 2,
            }
            for device in devices
        },
        refused={"pi-zero": reason},
        server_ranks=dict.fromkeys(modules(range(BLOCKS)), 16),
    )


def _train(
    writer: MetricsWriter, clock: FakeClock, number: int, *, devices: Sequence[str], steps: int
) -> None:
    first = (number - 1) * steps
    for step in range(first + 1, first + steps + 1):
        clock.advance(STEP_S)
        traffic = {"traffic/bytes_up": 1e6 * step, "traffic/bytes_down": 2e6 * step}
        writer.write({"train/loss": 5.0 - 0.1 * step, **traffic}, round_=number, step=step)
    clock.advance(ROUND_REST_S)
    busy_s = steps * STEP_S
    whole = {
        "round/seconds": busy_s + ROUND_REST_S,
        "round/train_loss": 5.0 - 0.1 * first,
        "round/server_busy_s": busy_s / 2,
        "aggregation/norm": float(number),
        "aggregation/largest_rank": 16.0 * number,
        "aggregation/relative_error": 1e-7 * (number - 1),
        "aggregation/error": 0.5e-7 * (number - 1),
    }
    for device in devices:
        own = {"busy_s": busy_s, "compute_s": busy_s / 4, "temperature_c": 40.0 + number}
        own |= {"free_memory_bytes": 2e9, "accelerator_load_percent": 50.0, "target_tokens": 90.0}
        whole |= {f"device/{device}/{name}": value for name, value in own.items()}
    writer.write(whole, round_=number, step=first + steps)


def _evaluated(perplexity: float, devices: Sequence[str]) -> dict[str, float]:
    own = {f"device/{device}/perplexity": perplexity for device in devices}
    return {**own, "eval/perplexity": perplexity, "eval/loss": math.log(perplexity)}


def _summary(steps: int, devices: Sequence[str]) -> Summary:
    one = DeviceSummary(split_layer=1, ranks={}, target_tokens=270)
    return Summary(
        perplexity_before=100.0,
        perplexity_after=33.25,
        steps=steps,
        seconds=33.0,
        bytes_up=12_000_000,
        bytes_down=24_000_000,
        devices={DeviceId(device): one for device in devices},
    )
