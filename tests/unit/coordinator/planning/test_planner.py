"""From a memory limit to a part: monotone, never a guess, and an error with both numbers."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from coordinator.planning.device_plan import adaptable_shapes
from coordinator.planning.estimate import memory_bytes, plan_device
from coordinator.settings import DeviceTerms
from shared.architecture import ModelArchitecture
from shared.errors import PlanError
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, TrainingTerms

NANO = DeviceId("nano")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA = ModelArchitecture.from_config(CONFIG)
TRAINING = TrainingTerms(max_length=64)
TERMS = DeviceTerms(
    split_layer=None,
    batch=8,
    micro_batch=4,
    in_flight=2,
    memory_limit_bytes=None,
    lora=LoraTerms(r=4),
)


def plan(declared=None, *, training=TRAINING, architecture=LLAMA, **changes):
    return plan_device(
        NANO,
        dataclasses.replace(TERMS, **changes),
        architecture=architecture,
        training=training,
        declared_limit_bytes=declared,
    )


def needs(split_layer, *, training=TRAINING, architecture=LLAMA, **changes):
    terms = dataclasses.replace(TERMS, **changes)
    return memory_bytes(split_layer, terms, architecture=architecture, training=training)


def test_a_stated_split_layer_is_taken_whatever_the_limit():
    assert plan(split_layer=3, memory_limit_bytes=1).split_layer == 3


@pytest.mark.parametrize("split_layer", [0, 9])
def test_a_stated_split_layer_out_of_range_is_refused_with_the_range(split_layer):
    with pytest.raises(PlanError, match=f"{split_layer}.*1.*8"):
        plan(split_layer=split_layer)


def test_without_any_limit_a_device_takes_a_quarter_of_the_blocks_and_at_least_one():
    assert plan().split_layer == 2
    small = ModelArchitecture.from_config({**CONFIG, "num_hidden_layers": 3})
    assert plan(architecture=small).split_layer == 1


@pytest.mark.parametrize("split_layer", range(1, 9))
def test_exactly_enough_memory_is_enough_and_a_byte_less_is_not(split_layer):
    enough = needs(split_layer)
    assert plan(enough).split_layer == split_layer
    if split_layer > 1:
        assert plan(enough - 1).split_layer == split_layer - 1


def test_more_memory_than_the_model_needs_takes_the_model():
    assert plan(10**12).split_layer == 8


def test_the_smaller_of_both_words_about_memory_holds():
    assert plan(needs(2), memory_limit_bytes=needs(6)).split_layer == 2
    assert plan(needs(6), memory_limit_bytes=needs(2)).split_layer == 2


def test_nothing_fits_is_an_error_with_both_numbers_and_what_to_do():
    one = needs(1)
    with pytest.raises(PlanError, match="nano may use 300 MiB, but one block") as refused:
        plan(300 * 2**20, micro_batch=8)
    assert f"about {needs(1, micro_batch=8) / 2**20:.0f} MiB" in str(refused.value)
    assert re.search(r"8 x 64 tokens.*memory_limit, or lower plan\.micro_batch", str(refused.value))
    with pytest.raises(PlanError):
        plan(one - 1)


sizes = st.builds(
    dict,
    micro_batch=st.integers(1, 8),
    in_flight=st.integers(1, 4),
    lora=st.builds(LoraTerms, r=st.integers(0, 31)),
)


@settings(deadline=None)
@given(size=sizes, limit=st.integers(2**28, 2**30), more=st.integers(0, 2**28))
def test_more_memory_never_means_fewer_blocks(size, limit, more):
    try:
        less = plan(limit, **size).split_layer
    except PlanError:
        reject()
    assert plan(limit + more, **size).split_layer >= less


@settings(deadline=None)
@given(split_layer=st.integers(1, 7), size=sizes)
def test_memory_grows_with_blocks_rank_length_and_what_is_in_flight(split_layer, size):
    least = needs(split_layer, **size)
    assert needs(split_layer + 1, **size) > least
    rank = size["lora"].r
    assert needs(split_layer, **{**size, "lora": LoraTerms(r=rank + 1)}) > least
    assert needs(split_layer, **{**size, "micro_batch": size["micro_batch"] + 1}) > least
    assert needs(split_layer, **{**size, "in_flight": size["in_flight"] + 1}) > least
    longer = dataclasses.replace(TRAINING, max_length=65)
    assert needs(split_layer, training=longer, **size) > least


def test_half_the_width_of_the_base_takes_less_and_a_head_elsewhere_too():
    bfloat16 = dataclasses.replace(TRAINING, dtype="bfloat16")
    assert needs(4, training=bfloat16) < needs(4)
    at_the_server = dataclasses.replace(TRAINING, labels="server")
    assert needs(4) - needs(4, training=at_the_server) == 1000 * 64 * 4, "the untied head"
    tied = ModelArchitecture.from_config({**CONFIG, "tie_word_embeddings": True})
    assert needs(4, architecture=tied) == needs(4, training=at_the_server)


def test_the_ranks_name_every_adapted_module_of_the_front_and_no_other():
    found = plan(split_layer=2, lora=LoraTerms(r=4, lora_alpha=16))
    modules = {f"model.layers.{j}.self_attn.{p}" for j in (0, 1) for p in ("q_proj", "v_proj")}
    assert dict(found.ranks) == dict.fromkeys(modules, 4)
    assert dict(found.scalings) == dict.fromkeys(modules, 4.0)


def test_patterns_change_rank_and_scaling_of_what_they_match():
    lora = LoraTerms(
        r=4,
        lora_alpha=16,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={r"layers\.0\..*": 8, "v_proj": 0},
        alpha_pattern={"q_proj": 4},
    )
    found = plan(split_layer=2, lora=lora)
    assert found.ranks == {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.0.self_attn.v_proj": 8,
        "model.layers.1.self_attn.q_proj": 4,
    }, "rank 0 is not adapted; of two patterns the first holds"
    assert found.scalings == {
        "model.layers.0.self_attn.q_proj": 0.5,
        "model.layers.0.self_attn.v_proj": 2.0,
        "model.layers.1.self_attn.q_proj": 1.0,
    }


def test_a_target_that_does_not_exist_or_a_rank_too_large_is_refused_by_name():
    with pytest.raises(PlanError, match="'c_attn' does not exist"):
        plan(split_layer=1, lora=LoraTerms(target_modules=("c_attn",)))
    with pytest.raises(PlanError, match="rank 65 for model.layers.0.self_attn.q_proj"):
        plan(split_layer=1, lora=LoraTerms(r=65))


def test_batch_and_flight_are_those_of_the_settings():
    found = plan(batch=6, micro_batch=3, in_flight=5)
    assert (found.batch, found.micro_batch, found.in_flight) == (6, 3, 5)


def test_what_any_device_may_adapt_does_not_depend_on_ranks():
    lora = LoraTerms(r=0, target_modules=("q_proj", "k_proj"), rank_pattern={"q_proj": 0})
    shapes = adaptable_shapes(lora, LLAMA)
    assert shapes["model.layers.7.self_attn.k_proj"] == (32, 64), "(out, in)"
    assert len(shapes) == 2 * 8
