"""Masks of LoRA's dropout: their share, their mean, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.backends.dropout_masks import DropoutMasks

SHAPE = (400, 250)
MASKS = DropoutMasks(0.3)


def mask(seed=1, module="model.layers.0.self_attn.q_proj", shape=SHAPE):
    return MASKS.mask_MI(seed, module, shape=shape)


def correlation(one, other):
    return float(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1])


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_the_share_and_the_mean_are_right(probability):
    found = DropoutMasks(probability).mask_MI(7, "m", shape=SHAPE)
    assert found.dtype == np.float32
    assert found.shape == SHAPE
    # Five standard deviations of 100,000 draws; the seed is fixed.
    bound = 5 * np.sqrt(probability * (1 - probability) / found.size)
    assert float((found == 0).mean()) == pytest.approx(probability, abs=bound)
    assert float(found.mean()) == pytest.approx(1.0, abs=bound / (1 - probability))
    assert np.unique(found).tolist() == [0.0, pytest.approx(1 / (1 - probability), rel=1e-4)]


def test_without_a_probability_nothing_is_dropped():
    assert (DropoutMasks(0.0).mask_MI(7, "m", shape=SHAPE) == 1.0).all()


def test_the_same_arguments_give_the_same_mask_in_any_order():
    first, second = mask(1), mask(2)
    np.testing.assert_array_equal(mask(2), second)
    np.testing.assert_array_equal(mask(1), first)
    np.testing.assert_array_equal(
        DropoutMasks(0.3).mask_MI(1, "m", shape=(3, 5)), mask(1, "m", (3, 5))
    )


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"seed": 2**63 - 1}, {"module": "model.layers.1.mlp"}]
)
def test_masks_of_other_micro_batches_and_modules_are_independent(other):
    assert abs(correlation(mask(), mask(**other))) < 5 / np.sqrt(np.prod(SHAPE))


def test_rows_and_columns_are_independent():
    found, bound = mask(), 5 / np.sqrt(np.prod(SHAPE))
    assert abs(correlation(found[1:], found[:-1])) < bound
    assert abs(correlation(found[:, 1:], found[:, :-1])) < bound


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7)])
def test_any_shape_can_be_asked_for(shape):
    assert mask(shape=shape).shape == shape
