"""What the fit does with points that say little, or that cannot be true."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shared.costs import BYTES_PER_PARAMETER, fit
from shared.errors import PlanError
from shared.protocol.profile import BlockPoint, HeadPoint, Measurements, OptimizerPoint
from tests.support.measured import measurements

MIB = 2**20
RUNTIME = 300 * MIB


def point(blocks: int, sequences: int, **changes: object) -> BlockPoint:
    tokens = 128 * sequences
    exact = BlockPoint(
        blocks=blocks,
        adapter_parameters=10_000 * blocks,
        sequences=sequences,
        length=128,
        forward_s=1e-5 * tokens * blocks,
        backward_s=2e-5 * tokens * blocks,
        peak_bytes=RUNTIME + (40 + 5 * blocks) * MIB + 40_000 * tokens * blocks,
    )
    return dataclasses.replace(exact, **changes)  # type: ignore[arg-type]


def measured(*blocks: BlockPoint, **changes: object) -> Measurements:
    return measurements(**{"runtime_bytes": RUNTIME, "blocks": blocks, **changes})


FOUR = (point(1, 1), point(1, 8), point(3, 1), point(3, 8))


def test_one_number_of_tokens_makes_time_proportional_to_tokens():
    costs = fit(measured(point(1, 8), point(2, 8), point(3, 8)))
    known = costs.forward_s(blocks=3, tokens=1024, adapter_parameters=30_000)
    assert known == pytest.approx(3 * 1024e-5, rel=1e-3)
    half = costs.forward_s(blocks=3, tokens=512, adapter_parameters=30_000)
    assert half == pytest.approx(known / 2, rel=0.01)


def test_one_number_of_blocks_makes_time_and_memory_grow_with_blocks():
    costs = fit(measured(point(2, 1), point(2, 4), point(2, 8)))
    known = costs.backward_s(blocks=2, tokens=1024, adapter_parameters=20_000)
    more = costs.backward_s(blocks=4, tokens=1024, adapter_parameters=40_000)
    assert more == pytest.approx(2 * known, rel=0.02)
    at_none, per_block = costs.memory_line(tokens=1024)
    assert at_none >= RUNTIME
    assert per_block > 0


def test_time_that_falls_with_more_blocks_is_no_reason_for_negative_costs():
    falling = [point(1, 8, forward_s=0.9), point(3, 8, forward_s=0.1), point(2, 8, forward_s=0.5)]
    costs = fit(measured(*falling))
    seconds = costs.forward_s(
        blocks=np.arange(50), tokens=1024, adapter_parameters=1000 * np.arange(50)
    )
    assert np.all(np.diff(seconds) >= 0)
    assert np.all(seconds >= 0)


def test_a_slow_outlier_does_not_rule_over_the_others():
    costs = fit(measured(*FOUR, point(2, 4, forward_s=10 * 2 * 512e-5)))
    seconds = costs.forward_s(blocks=1, tokens=128, adapter_parameters=10_000)
    assert seconds < 5 * 128e-5


def test_without_a_head_measured_the_head_costs_nothing():
    costs = fit(measured(*FOUR))
    shape = {"blocks": 2, "tokens": 512, "adapter_parameters": 0, "in_flight": 1}
    assert costs.head_s(tokens=1000) == 0
    assert costs.optimizer_s(adapter_parameters=1000) == 0
    assert costs.peak_bytes(**shape, head_tokens=512) == costs.peak_bytes(**shape, head_tokens=0)


def test_the_head_takes_memory_only_where_it_needs_more_than_the_blocks_for_a_moment():
    heads = (
        HeadPoint(tokens=128, seconds=0.01, extra_bytes=50 * MIB),
        HeadPoint(tokens=1024, seconds=0.08, extra_bytes=400 * MIB),
    )
    costs = fit(measured(*FOUR, head=heads))
    shape = {"blocks": 2, "tokens": 1024, "adapter_parameters": 0, "in_flight": 1}
    without = costs.peak_bytes(**shape, head_tokens=0)
    with_head = costs.peak_bytes(**shape, head_tokens=1024)
    assert with_head - without <= 400 * MIB * 1.001
    assert with_head > without + 300 * MIB
    assert costs.head_s(tokens=512) == pytest.approx(0.04, rel=1e-3)


def test_every_adapter_parameter_costs_its_value_gradient_and_two_moments():
    costs = fit(measured(*FOUR))
    shape = {"blocks": 2, "tokens": 512, "in_flight": 1, "head_tokens": 0}
    less = costs.peak_bytes(**shape, adapter_parameters=0)
    more = costs.peak_bytes(**shape, adapter_parameters=1_000_000)
    assert more - less == pytest.approx(1_000_000 * BYTES_PER_PARAMETER)


def test_an_evaluation_keeps_nothing():
    costs = fit(measured(*FOUR))
    shape = {"blocks": 3, "adapter_parameters": 0, "head_tokens": 0}
    at_rest = costs.peak_bytes(**shape, tokens=0, in_flight=1)
    assert costs.peak_bytes(**shape, tokens=128, in_flight=0) < costs.peak_bytes(
        **shape, tokens=128, in_flight=1
    )
    assert costs.peak_bytes(**shape, tokens=128, in_flight=0) >= at_rest


def test_the_memory_line_is_the_peak_of_one_micro_batch_without_adapters():
    costs = fit(measured(*FOUR))
    at_none, per_block = costs.memory_line(tokens=640)
    shape = {"tokens": 640, "adapter_parameters": 0, "in_flight": 1, "head_tokens": 0}
    for blocks in (1, 5):
        assert at_none + blocks * per_block == pytest.approx(
            costs.peak_bytes(blocks=blocks, **shape)
        )


def test_arguments_may_be_arrays_that_broadcast():
    costs = fit(measured(*FOUR, optimizer=(OptimizerPoint(adapter_parameters=10, seconds=1.0),)))
    blocks, tokens = np.arange(1, 4)[:, None], np.array([128, 256])
    seconds = costs.forward_s(blocks=blocks, tokens=tokens, adapter_parameters=0)
    peaks = costs.peak_bytes(
        blocks=blocks, tokens=tokens, adapter_parameters=0, in_flight=2, head_tokens=tokens
    )
    assert np.shape(seconds) == np.shape(peaks) == (3, 2)
    one = costs.forward_s(blocks=2, tokens=256, adapter_parameters=0)
    assert seconds[1, 1] == pytest.approx(one)


def test_a_peak_far_below_what_the_program_takes_without_a_model_is_refused():
    absurd = point(1, 1, peak_bytes=100 * MIB)
    with pytest.raises(PlanError, match=r"100\.0 MiB with a model, but 300\.0 MiB without"):
        fit(measured(absurd, *FOUR[1:]))


def test_a_peak_a_little_below_it_is_not():
    little = point(1, 1, peak_bytes=RUNTIME - MIB)
    costs = fit(measured(little, *FOUR[1:]))
    assert costs.memory_line(tokens=1)[0] >= RUNTIME
