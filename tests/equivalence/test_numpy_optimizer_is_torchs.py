"""The agent's optimizer in numpy takes the steps that torch's takes, through every event."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edge_agent.backends.numpy_optimizer import NumpyOptimizer
from shared.errors import NumericsError
from shared.modeling.optimizer import AdapterOptimizer
from shared.terms import OptimizerTerms

SHAPES = {
    "q": ((4, 12), (20, 4)),
    "v": ((2, 12), (7, 2)),
    "classifier": ((3, 12),),
}
ADAMW = OptimizerTerms(
    learning_rate=0.02, weight_decay=0.05, warmup_steps=5, rewarm_steps=4, max_grad_norm=0.5
)
STEPS = 30


class Twins:
    """Both optimizers on the same modules: what is done to one is done to the other."""

    def __init__(self, terms, *, seed=0, freeze_a=False):
        self.random = np.random.default_rng(seed)
        self.freeze_a = freeze_a
        self.arrays, self.parameters = {}, {}
        self.ours = NumpyOptimizer(terms, total_steps=STEPS)
        self.torchs = AdapterOptimizer(terms, total_steps=STEPS)
        self.put(*SHAPES)

    def put(self, *names):
        """Follow fresh arrays in place of those that these modules had."""
        for name in names:
            arrays = [self.random.standard_normal(s, dtype=np.float32) for s in SHAPES[name]]
            self.parameters[name] = tuple(nn.Parameter(torch.from_numpy(a.copy())) for a in arrays)
            if self.freezes(name):
                self.parameters[name][0].requires_grad_(False)
            self.arrays[name] = tuple(arrays[self.freezes(name) :])
        self.follow()

    def drop(self, name):
        """Follow this module no longer: it has no rank any more."""
        del self.arrays[name], self.parameters[name]
        self.follow()

    def freezes(self, name):
        return self.freeze_a and name != "classifier"

    def follow(self):
        self.ours.follow(self.arrays)
        self.torchs.follow(self.parameters)

    def learn(self, *names, scale=1.0):
        """Accumulate the same random gradients in both."""
        for name in names:
            gradients = [
                (scale * self.random.standard_normal(a.shape)).astype(np.float32)
                for a in self.arrays[name]
            ]
            for parameter, gradient in zip(self.trained(name), gradients, strict=True):
                known = 0.0 if parameter.grad is None else parameter.grad
                parameter.grad = torch.from_numpy(gradient.copy()) + known
            self.ours.accumulate(name, tuple(gradients))

    def trained(self, name):
        return self.parameters[name][self.freezes(name) :]

    def step(self, step, *, denominator=5):
        norm = self.ours.step(step, denominator=denominator)
        expected = self.torchs.step(step, denominator=denominator)
        assert norm == pytest.approx(expected, rel=1e-6)
        self.agree()
        return norm

    def fail(self, step, *, match, denominator=5):
        for optimizer in (self.ours, self.torchs):
            with pytest.raises(NumericsError, match=match):
                optimizer.step(step, denominator=denominator)
        self.agree()

    def agree(self):
        """Check every entry to 1e-6 of the largest of its array."""
        for name, arrays in self.arrays.items():
            for array, parameter in zip(arrays, self.trained(name), strict=True):
                expected = parameter.detach().numpy()
                bound = 1e-6 * float(np.abs(expected).max())
                np.testing.assert_allclose(array, expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e5])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_thirty_steps_are_torchs(name, max_grad_norm, schedule):
    terms = replace(ADAMW, name=name, max_grad_norm=max_grad_norm, schedule=schedule)
    twins = Twins(terms)
    for step in range(STEPS):
        twins.learn(*SHAPES)
        twins.learn("q", "classifier")  # a second micro-batch
        assert 0.5 < twins.step(step) < 1e5


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_hand_backs_and_idle_modules_are_torchs(name, freeze_a):
    twins = Twins(replace(ADAMW, name=name), freeze_a=freeze_a)
    for step in range(STEPS):
        if step == 7:
            twins.put("q")
        if step == 12:
            twins.put("q", "v")
        if step == 15:
            twins.drop("v")
        if step == 20:
            twins.put("v")
        twins.learn("q", "classifier")
        if step % 3 and "v" in twins.arrays:
            twins.learn("v")
        twins.step(step)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_after_a_refused_step_both_go_on_alike(name):
    twins = Twins(replace(ADAMW, name=name))
    for step in range(12):
        twins.learn(*SHAPES)
        if step == 3:
            twins.learn("v", scale=float("nan"))
            twins.fail(step, match="step 3 are not finite")
        elif step == 5:
            twins.fail(step, match="step 5 has no target tokens", denominator=0)
        elif step == 8:
            twins.ours.discard()
            twins.torchs.discard()
            assert twins.step(step) == 0.0
        else:
            twins.step(step)


terms = st.builds(
    OptimizerTerms,
    name=st.sampled_from(["adamw", "sgd"]),
    learning_rate=st.floats(1e-5, 0.05),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.0, 0.9, 0.999]),
    weight_decay=st.floats(0.0, 0.2),
    warmup_steps=st.integers(0, 6),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    min_learning_rate_ratio=st.floats(0.0, 1.0),
    rewarm_steps=st.integers(0, 6),
    max_grad_norm=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
)
modules = st.sets(st.sampled_from(sorted(SHAPES)))
events = st.lists(st.tuples(modules, modules, st.sampled_from([0, 1, 7])), min_size=1, max_size=10)


@given(terms, events, st.integers(0, 25), st.integers(0, 2**16))
@settings(deadline=None, max_examples=60)
def test_any_terms_and_any_events_are_torchs(chosen, script, first, seed):
    twins = Twins(chosen, seed=seed)
    for step, (replaced, learning, denominator) in enumerate(script, start=first):
        twins.put(*sorted(replaced))
        twins.learn(*sorted(learning))
        if denominator:
            twins.step(step, denominator=denominator)
        else:
            twins.fail(step, denominator=0, match="no target tokens")
