"""The optimizer without torch: its maths by hand, what it owns, what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_agent.backends.numpy_optimizer import NumpyOptimizer
from shared.errors import NumericsError, ProtocolError
from shared.terms import OptimizerTerms

STEADY = {"schedule": "constant", "max_grad_norm": 0.0, "rewarm_steps": 0}
PLAIN = OptimizerTerms(name="sgd", learning_rate=1.0, weight_decay=0.0, **STEADY)


def array(*values):
    return np.array(values, dtype=np.float32)


def started(terms, **modules):
    optimizer = NumpyOptimizer(terms, total_steps=100)
    optimizer.follow(modules)
    return optimizer


def learn(optimizer, step, *, denominator=1, **gradients):
    for name, gradient in gradients.items():
        optimizer.accumulate(name, (gradient,))
    return optimizer.step(step, denominator=denominator)


def test_adamw_is_the_papers():
    terms = OptimizerTerms(learning_rate=0.1, weight_decay=0.2, epsilon=1e-3, **STEADY)
    weight = array(2.0)
    optimizer = started(terms, w=(weight,))
    p, m, v = 2.0, 0.0, 0.0
    for t, g in enumerate([0.5, -1.0, 0.25, 3.0], start=1):
        learn(optimizer, t - 1, w=array(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p -= 0.1 * 0.2 * p
        p -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-3)
        assert weight[0] == pytest.approx(p, rel=1e-6)


def test_sgd_moves_against_the_gradient_and_decays():
    terms = OptimizerTerms(name="sgd", learning_rate=0.5, weight_decay=0.25, **STEADY)
    weight = array(4.0)
    learn(started(terms, w=(weight,)), 0, w=array(2.0))
    assert weight.tolist() == [4.0 - 0.5 * (2.0 + 0.25 * 4.0)]


def test_gradients_are_added_up_divided_and_clipped_together():
    terms = OptimizerTerms(
        name="sgd", learning_rate=1.0, weight_decay=0.0, **{**STEADY, "max_grad_norm": 1.0}
    )
    a, b = array(0.0), array(0.0)
    optimizer = started(terms, m=(a, b))
    optimizer.accumulate("m", (array(4.0), array(2.0)))
    optimizer.accumulate("m", (array(2.0), array(6.0)))
    assert optimizer.step(0, denominator=2) == pytest.approx(5.0)
    np.testing.assert_allclose([a[0], b[0]], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("terms", [PLAIN, OptimizerTerms(learning_rate=1.0, **STEADY)])
def test_every_entry_of_a_large_matrix_is_updated_alike(terms):
    weight = np.zeros((3, 33_001), np.float32)
    norm = learn(started(terms, w=(weight,)), 0, w=np.ones_like(weight))
    assert norm == pytest.approx(math.sqrt(weight.size), rel=1e-6)
    assert weight[0, 0] == pytest.approx(-1.0)
    assert (weight == weight[0, 0]).all()


def test_the_first_gradients_are_taken_over_without_a_copy():
    optimizer = started(PLAIN, w=(array(0.0),))
    first, second = array(1.0), array(2.0)
    optimizer.accumulate("w", (first,))
    optimizer.accumulate("w", (second,))
    assert (first.tolist(), second.tolist()) == ([3.0], [2.0])


def test_gradients_that_cannot_be_written_into_are_copied():
    weight = np.zeros((2, 3), np.float32)
    gradient = np.arange(6.0, dtype=np.float32).reshape(3, 2).T
    gradient.flags.writeable = False
    learn(started(PLAIN, w=(weight,)), 0, w=gradient)
    np.testing.assert_array_equal(weight, -gradient)


def test_a_kept_module_keeps_its_gradients_and_a_replaced_one_loses_them():
    kept, old, new = array(0.0), array(0.0), array(0.0)
    optimizer = started(PLAIN, kept=(kept,), other=(old,))
    optimizer.accumulate("kept", (array(1.0),))
    optimizer.accumulate("other", (array(1.0),))
    optimizer.follow({"kept": (kept,), "other": (new,)})
    assert optimizer.step(0, denominator=1) == 1.0
    assert (kept[0], old[0], new[0]) == (-1.0, 0.0, 0.0)


def test_what_is_discarded_teaches_nothing():
    weight = array(1.0)
    optimizer = started(PLAIN, w=(weight,))
    optimizer.accumulate("w", (array(1.0),))
    optimizer.discard()
    assert optimizer.step(0, denominator=1) == 0.0
    assert weight.tolist() == [1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    weight = array(1.0, 1.0)
    optimizer = started(PLAIN, w=(weight,))
    with pytest.raises(NumericsError, match="step 7 are not finite"):
        learn(optimizer, 7, w=array(1.0, bad))
    assert weight.tolist() == [1.0, 1.0]
    assert optimizer.step(8, denominator=1) == 0.0


def test_infinities_that_cancel_are_still_not_finite():
    optimizer = started(PLAIN, w=(array(1.0),))
    optimizer.accumulate("w", (array(float("inf")),))
    with pytest.raises(NumericsError, match="not finite"):
        learn(optimizer, 0, w=array(-float("inf")))


def test_a_step_without_target_tokens_is_an_error_and_consumes_the_gradients():
    optimizer = started(PLAIN, w=(array(1.0),))
    with pytest.raises(NumericsError, match="step 4 has no target tokens"):
        learn(optimizer, 4, w=array(1.0), denominator=0)
    assert optimizer.step(5, denominator=1) == 0.0


def test_nothing_to_optimise_is_no_error():
    assert started(PLAIN).step(0, denominator=7) == 0.0


def test_gradients_of_a_module_that_is_not_trained_are_refused():
    with pytest.raises(ProtocolError, match="gradients came for x, which is not trained here"):
        started(PLAIN, w=(array(1.0),)).accumulate("x", (array(1.0),))


@pytest.mark.parametrize("gradients", [(), (array(1.0, 2.0),), (array(1.0), array(1.0))])
def test_gradients_of_other_shapes_are_refused(gradients):
    optimizer = started(PLAIN, w=(array(1.0),))
    with pytest.raises(NumericsError, match="gradients of w: expected shapes"):
        optimizer.accumulate("w", gradients)


@pytest.mark.parametrize(
    "weight", [np.zeros(2), np.zeros((2, 4), np.float32).T, np.broadcast_to(np.float32(0), (3,))]
)
def test_what_cannot_be_updated_in_place_is_refused(weight):
    with pytest.raises(ValueError, match="w: .* is not updated in place"):
        started(PLAIN, w=(weight,))
