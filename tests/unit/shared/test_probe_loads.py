"""Which points are measured, and with which adapters."""

from __future__ import annotations

import numpy as np
import pytest

from shared.architecture import ModelArchitecture
from shared.probe_loads import (
    Load,
    fresh_adapters,
    loads,
    parameter_count,
    random_tokens,
    small_values_ND,
    two_ranks,
)
from shared.terms import LoraTerms
from tests.support.tiny_models import CONFIGS

GPT2 = ModelArchitecture.from_config(CONFIGS["gpt2"])


def of_blocks(planned: tuple[Load, ...]) -> list[Load]:
    return [load for load in planned if load.part == "blocks"]


def test_blocks_tokens_and_adapters_are_each_measured_in_two_sizes():
    points = of_blocks(loads(6, micro_batch=8, length=128, head=True))
    assert {load.blocks for load in points} == {1, 3}
    assert {load.tokens for load in points} == {128, 1024}
    assert {load.larger_adapters for load in points} == {False, True}
    assert {load.in_flight for load in points} == {1, 2}


def test_the_smallest_point_comes_first_and_the_largest_last():
    points = of_blocks(loads(6, micro_batch=8, length=128, head=True))
    assert points[0].size == min(load.size for load in points)
    assert points[-1].size == max(load.size for load in points)
    sizes = [load.size for load in points if load.blocks == 1]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("available", "most"), [(1, 1), (2, 2), (3, 3), (40, 3)])
def test_no_more_blocks_are_measured_than_there_are_and_never_many(available, most):
    points = of_blocks(loads(available, micro_batch=2, length=16, head=False))
    assert max(load.blocks for load in points) == most
    assert len(points) >= 3


def test_one_sequence_in_a_micro_batch_is_measured_at_two_lengths():
    points = of_blocks(loads(3, micro_batch=1, length=100, head=True))
    assert {load.tokens for load in points} == {50, 100}


def test_a_head_elsewhere_is_not_measured():
    assert not [x for x in loads(3, micro_batch=2, length=16, head=False) if x.part == "head"]
    heads = [x for x in loads(3, micro_batch=2, length=16, head=True) if x.part == "head"]
    assert [load.tokens for load in heads] == [32, 16]


def test_halving_ends():
    load: Load | None = Load(blocks=3, sequences=8, length=128, in_flight=2)
    sizes = []
    while load is not None:
        sizes.append(load.size)
        load = load.halved()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 3


def test_the_larger_adapters_are_four_times_as_large_as_far_as_the_weights_allow():
    smaller, larger = two_ranks(GPT2, LoraTerms(r=4), blocks=range(2))
    assert (
        set(smaller)
        == set(larger)
        == {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    )
    assert set(smaller.values()) == {4}
    assert set(larger.values()) == {16}
    _, larger = two_ranks(GPT2, LoraTerms(r=20), blocks=range(1))
    assert set(larger.values()) == {32}


def test_terms_that_leave_all_ranks_to_the_plan_are_measured_at_some_rank():
    smaller, larger = two_ranks(GPT2, LoraTerms(r=0), blocks=range(1))
    assert 0 < parameter_count(GPT2, smaller) < parameter_count(GPT2, larger)


def test_adapters_have_their_ranks_and_no_zeros():
    ranks, _ = two_ranks(GPT2, LoraTerms(r=4), blocks=range(1))
    (adapter,) = fresh_adapters(GPT2, ranks, seed=0).values()
    pair = adapter.trainable
    assert pair.a_RI.shape == (4, 32)
    assert pair.b_OR.shape == (96, 4)
    assert pair.a_RI.dtype == pair.b_OR.dtype == np.float32
    assert np.all(pair.a_RI != 0)
    assert np.all(pair.b_OR != 0)
    assert parameter_count(GPT2, ranks) == pair.a_RI.size + pair.b_OR.size


def test_tokens_are_words_of_the_model_and_values_small():
    tokens = random_tokens(1000, vocab_size=101, seed=0)
    assert 0 <= tokens.min() <= tokens.max() < 101
    assert 0 < np.abs(small_values_ND(10, 32, seed=0)).max() < 0.01
