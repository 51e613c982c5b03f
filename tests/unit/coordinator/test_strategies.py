"""A strategy's name becomes settings; what it cannot do is refused, with what to use instead."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from coordinator.settings import CoordinatorSettings, StrategyName
from coordinator.strategies import STRATEGIES, applied
from shared.errors import ConfigError

BLOCKS = 6
WHOLE = ("hlora", "fedlora", "hetlora", "flora", "ffa-lora")


def settings(strategy: str, **sections: Any) -> CoordinatorSettings:
    return CoordinatorSettings(model={"name": "m"}, strategy=strategy, **sections)


def decided(strategy: str, **sections: Any) -> CoordinatorSettings:
    return applied(settings(strategy, **sections), block_count=BLOCKS)


def test_every_name_has_a_row():
    assert set(get_args(StrategyName)) == set(STRATEGIES)


def test_the_default_changes_nothing():
    plain = CoordinatorSettings(model={"name": "m"})
    assert plain.strategy == "hsplitlora"
    assert applied(plain, block_count=BLOCKS).resolved() == plain.resolved()


@pytest.mark.parametrize("name", WHOLE)
def test_without_a_cut_every_device_holds_all_blocks(name):
    got = decided(name)
    assert got.plan.split_layer == BLOCKS
    assert not got.plan.adapt


@pytest.mark.parametrize(
    ("name", "hand_back"),
    [
        ("hsplitlora", "residual"),
        ("splitlora", "average"),
        ("hlora", "svd"),
        ("fedlora", "average"),
        ("hetlora", "zero-pad"),
        ("flora", "merge"),
        ("ffa-lora", "average"),
    ],
)
def test_each_method_hands_back_as_its_paper_does(name, hand_back):
    assert decided(name).aggregation.hand_back == hand_back
    assert decided(name).lora.freeze_a == (name == "ffa-lora")
    assert decided(name).plan.ranks == ("importance" if name == "hsplitlora" else "uniform")


def test_split_lora_leaves_its_one_split_layer_to_the_planner_or_to_a_person():
    assert decided("splitlora").plan.split_layer is None
    assert decided("splitlora").plan.one_split_layer
    assert decided("splitlora", plan={"split_layer": 3}).plan.split_layer == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_was_decided_is_decided_alike_again(name):
    once = decided(name)
    again = CoordinatorSettings(**once.resolved())
    assert applied(again, block_count=BLOCKS).resolved() == once.resolved()


def test_any_ablation_of_aggregation_is_a_setting_of_the_default():
    for mode in ("merge", "svd", "zero-pad"):
        got = decided("hsplitlora", aggregation={"hand_back": mode})
        assert got.aggregation.hand_back == mode


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("splitlora", {"aggregation": {"hand_back": "residual"}}, "which has average: remove it"),
        ("hsplitlora", {"aggregation": {"hand_back": "average"}}, "splitlora or fedlora"),
        ("hlora", {"training": {"labels": "server"}}, "set training.labels: device, or use"),
        ("fedlora", {"plan": {"split_layer": 2}}, "plan.split_layer is 2, but strategy: fedlora"),
        (
            "splitlora",
            {"plan": {"split_layer": 2, "devices": {"nano": {"split_layer": 3}}}},
            r"plan.devices.nano.split_layer is 3, but strategy: splitlora has one .* \(2\)",
        ),
        (
            "splitlora",
            {"plan": {"devices": {"nano": {"split_layer": 3}}}},
            "one split layer for all devices: remove it, set plan.split_layer for all",
        ),
        (
            "fedlora",
            {"plan": {"devices": {"nano": {"r": 4}}}},
            "plan.devices.nano.r: strategy: fedlora averages factors.*use hlora or hetlora",
        ),
        ("hetlora", {"plan": {"ranks": "importance"}}, "does not belong to strategy: hetlora"),
        ("flora", {"training": {"dtype": "bfloat16"}}, "loses most of it in bfloat16"),
        ("flora", {"training": {"int8_blocks": 1}}, "weights in 8 bits"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused_with_what_to_use_instead(name, sections, words):
    with pytest.raises(ConfigError, match=words):
        decided(name, **sections)


def test_equal_ranks_that_are_said_twice_are_equal():
    assert decided("fedlora", lora={"r": 4}, plan={"devices": {"nano": {"r": 4}}})


def test_unequal_ranks_are_what_hetlora_and_hlora_are_for():
    for name in ("hlora", "hetlora", "flora"):
        got = decided(name, plan={"devices": {"nano": {"r": 4}}})
        assert got.device_terms("nano").lora.r == 4
        assert got.device_terms("nano").split_layer == BLOCKS
