"""What is compared: each method as the settings that make a run of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from coordinator.strategies import STRATEGIES
from tests.testbed.comparison.fleet import FLEET
from tests.testbed.comparison.results import Kind

EQUAL_RANK = 8
"""The mean of the fleet's ranks, so that all methods have as many adapter parameters."""
ALPHA_PER_RANK = 2.0
TARGETS = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method. ``settings``: what it changes of a run; ``pooled``: one machine has all data."""

    name: str
    kind: Kind
    strategy: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    pooled: bool = False
    note: str = ""


def _strategies() -> tuple[Method, ...]:
    return tuple(Method(name=name, kind="strategy", strategy=name) for name in STRATEGIES)


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        *_strategies(),
        Method(
            name="cenlora",
            kind="reference",
            strategy="fedlora",
            pooled=True,
            note="centralised LoRA: all text on the server, which trains the whole model alone",
        ),
        Method(
            name="merged into base",
            kind="ablation",
            strategy="hsplitlora",
            settings={"aggregation": {"hand_back": "merge"}},
            note="the paper's own hand-back: into the base, and fresh adapters",
        ),
        Method(
            name="no importance",
            kind="ablation",
            strategy="hsplitlora",
            settings={"plan": {"ranks": "uniform"}},
            note="rank spread evenly over a device's modules",
        ),
        Method(
            name="no planned split",
            kind="ablation",
            strategy="hsplitlora",
            settings={"plan": {"one_split_layer": True, "balance_batches": False}},
            note="one split layer and one batch for all devices",
        ),
        Method(
            name="no exact sums",
            kind="ablation",
            strategy="hsplitlora",
            settings={"aggregation": {"hand_back": "zero-pad"}},
            note="factors padded, averaged and truncated, as HetLoRA does",
        ),
    )
}
"""By name."""


def lora_settings(method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ``lora`` section, and each device's own ranks where the method takes unequal ones.

    The scaling alpha / rank is the same for all.
    """
    alike = method.pooled or STRATEGIES[method.strategy].ranks == "one"  # type: ignore[index]
    shared = {"r": EQUAL_RANK, "lora_alpha": ALPHA_PER_RANK * EQUAL_RANK, "target_modules": TARGETS}
    own = {
        device.name: {"r": device.rank, "lora_alpha": ALPHA_PER_RANK * device.rank}
        for device in FLEET
    }
    return shared, {} if alike else own
