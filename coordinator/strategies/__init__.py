"""The methods of the field as rows of a table: where to cut, which ranks, how adapters meet. Pure.

A strategy is no code of its own: it chooses among what every run can do, so all of them are
compared on the same machinery, data and seeds. `applied` turns its name into settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from coordinator.settings import CoordinatorSettings, DeviceOverrides, StrategyName
from shared.errors import ConfigError
from shared.terms import HandBackMode

Cut: TypeAlias = Literal["each", "one", "none"]
"""A split layer for each device, one for all, or the whole model on every device."""
Ranks: TypeAlias = Literal["importance", "own", "one"]
"""By importance; as each device's settings say; the same for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One method. ``hand_backs``: those that belong to it, its own first."""

    cut: Cut
    ranks: Ranks
    hand_backs: tuple[HandBackMode, ...]
    freeze_a: bool = False
    paper: str


_ANY_RANKS: tuple[HandBackMode, ...] = ("residual", "merge", "svd", "zero-pad")

STRATEGIES: Mapping[StrategyName, Strategy] = {
    "hsplitlora": Strategy(
        cut="each", ranks="importance", hand_backs=_ANY_RANKS, paper="arXiv:2505.02795"
    ),
    "splitlora": Strategy(
        cut="one", ranks="one", hand_backs=("average",), paper="arXiv:2407.00952"
    ),
    "hlora": Strategy(cut="none", ranks="own", hand_backs=("svd",), paper="arXiv:2503.00813"),
    "fedlora": Strategy(cut="none", ranks="one", hand_backs=("average",), paper="arXiv:2305.05644"),
    "hetlora": Strategy(
        cut="none", ranks="own", hand_backs=("zero-pad",), paper="arXiv:2401.06432"
    ),
    "flora": Strategy(cut="none", ranks="own", hand_backs=("merge",), paper="arXiv:2409.05976"),
    "ffa-lora": Strategy(
        cut="none", ranks="one", hand_backs=("average",), freeze_a=True, paper="arXiv:2403.12313"
    ),
}
"""Every strategy, by its name in ``run.yaml``."""


def named(name: str) -> StrategyName:
    """Return ``name``, if it is a strategy's.

    Raises:
        ConfigError: it is none; the message lists all.
    """
    for known in STRATEGIES:
        if known == name:
            return known
    raise ConfigError(f"there is no strategy {name!r}: choose one of {', '.join(STRATEGIES)}")


def applied(settings: CoordinatorSettings, *, block_count: int) -> CoordinatorSettings:
    """Return ``settings`` with all that their strategy decides, for a model of so many blocks.

    What the strategy leaves open stays as it was said; applied twice, nothing changes.

    Raises:
        ConfigError: something was said that this strategy cannot do (and what to use instead).
    """
    strategy = STRATEGIES[settings.strategy]
    _check_cut(settings, strategy, block_count)
    _check_ranks(settings, strategy)
    hand_back = _hand_back(settings, strategy)
    _check_merge(settings, hand_back)
    plan: dict[str, Any] = {}
    if strategy.cut == "none":
        plan["split_layer"] = block_count
    if strategy.cut != "each":
        plan |= {"one_split_layer": True, "adapt": False, "balance_batches": False}
    if strategy.ranks != "importance":
        plan["ranks"] = "uniform"
    return settings.model_copy(
        update={
            "plan": settings.plan.model_copy(update=plan),
            "aggregation": settings.aggregation.model_copy(update={"hand_back": hand_back}),
            "lora": replace(settings.lora, freeze_a=settings.lora.freeze_a or strategy.freeze_a),
        }
    )


def _check_cut(settings: CoordinatorSettings, strategy: Strategy, block_count: int) -> None:
    if strategy.cut == "each":
        return
    name, plan = settings.strategy, settings.plan
    stated = {f"plan.devices.{d}": own.split_layer for d, own in plan.devices.items()}
    stated["plan"] = plan.split_layer
    if strategy.cut == "none":
        if settings.training.labels == "server":
            raise ConfigError(
                f"strategy: {name} keeps the whole model on every device, so the head is there: "
                "set training.labels: device, or use a strategy that splits (hsplitlora, splitlora)"
            )
        wanted, why = block_count, f"{name} keeps all {block_count} blocks on every device"
    elif plan.split_layer is None:
        wanted, why = None, f"{name} has one split layer for all devices"
    else:
        wanted, why = plan.split_layer, f"{name} has one split layer for all ({plan.split_layer})"
    for where, split_layer in stated.items():
        if split_layer is not None and split_layer != wanted:
            raise ConfigError(
                f"{where}.split_layer is {split_layer}, but strategy: {why}: remove it, set "
                "plan.split_layer for all of them, or use strategy: hsplitlora"
            )


def _check_ranks(settings: CoordinatorSettings, strategy: Strategy) -> None:
    name, plan = settings.strategy, settings.plan
    if strategy.ranks != "importance" and _is_said(plan, "ranks", "importance"):
        raise ConfigError(
            f"plan.ranks: importance does not belong to strategy: {name}: remove it, or use "
            "strategy: hsplitlora"
        )
    if strategy.ranks != "one":
        return
    for device, own in plan.devices.items():
        said = [key for key in _RANK_KEYS if getattr(own, key) is not None]
        if said and settings.device_terms(device).lora != settings.lora:
            raise ConfigError(
                f"plan.devices.{device}.{said[0]}: strategy: {name} averages factors, which takes "
                "the same ranks everywhere: remove it, or use hlora or hetlora (which take unequal "
                "ranks, with a loss) or hsplitlora (without)"
            )


_RANK_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
assert all(key in DeviceOverrides.model_fields for key in _RANK_KEYS)


def _hand_back(settings: CoordinatorSettings, strategy: Strategy) -> HandBackMode:
    said = settings.aggregation.hand_back
    if "hand_back" not in settings.aggregation.model_fields_set:
        return strategy.hand_backs[0]
    if said in strategy.hand_backs:
        return said
    fitting = [name for name, row in STRATEGIES.items() if said in row.hand_backs]
    raise ConfigError(
        f"aggregation.hand_back: {said} does not belong to strategy: {settings.strategy}, which "
        f"has {' or '.join(strategy.hand_backs)}: remove it, or use strategy: "
        f"{' or '.join(fitting)}"
    )


def _check_merge(settings: CoordinatorSettings, hand_back: HandBackMode) -> None:
    if hand_back == "merge" and settings.training.dtype != "float32":
        raise ConfigError(
            f"strategy: {settings.strategy} merges every update into the base, which loses most of "
            f"it in {settings.training.dtype}: use hsplitlora (residual), or training.dtype float32"
        )
    if hand_back == "merge" and settings.training.int8_blocks:
        raise ConfigError(
            f"strategy: {settings.strategy} merges every update into the base, and weights in 8 "
            "bits cannot be changed by so little: use hsplitlora (residual), or remove "
            "training.int8_blocks"
        )


def _is_said(section: Any, key: str, value: object) -> bool:
    return key in section.model_fields_set and getattr(section, key) == value
