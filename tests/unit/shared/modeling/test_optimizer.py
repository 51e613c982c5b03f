"""The optimizer: torch's maths, the run's schedule, and what hand-backs reset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import NumericsError, StorageError
from shared.modeling.optimizer import AdapterOptimizer
from shared.terms import OptimizerTerms

STEADY = OptimizerTerms(learning_rate=0.1, schedule="constant", max_grad_norm=0.0, rewarm_steps=4)


def factors(seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((rank, 3), (5, rank))
    )


def give_gradients(modules, seed):
    generator = torch.Generator().manual_seed(seed)
    for pair in modules.values():
        for parameter in pair:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(optimizer, modules, steps):
    for step in steps:
        give_gradients(modules, step)
        optimizer.step(step, denominator=1)


def started(terms=STEADY, **modules):
    optimizer = AdapterOptimizer(terms, total_steps=100)
    optimizer.follow(modules)
    return optimizer


def values(modules):
    return [p.detach().clone() for pair in modules.values() for p in pair]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_maths_is_torchs(name):
    terms = OptimizerTerms(name=name, learning_rate=0.1, schedule="constant", max_grad_norm=0.5)
    ours, theirs = {"m": factors()}, {"m": factors()}
    optimizer = started(terms, **ours)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    reference = kind(theirs["m"], lr=0.1, weight_decay=terms.weight_decay)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for parameter in theirs["m"]:
            parameter.grad /= 3
        expected = torch.nn.utils.clip_grad_norm_(theirs["m"], 0.5)
        reference.step()
        assert optimizer.step(step, denominator=3) == pytest.approx(float(expected), rel=1e-5)
    close(values(ours), values(theirs))


def moved_by_first_step(step, **terms):
    """How far one SGD step with a gradient of one goes: the learning rate."""
    chosen = OptimizerTerms(
        name="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.0, **terms
    )
    modules = {"m": factors()}
    optimizer = started(chosen, **modules)
    before = values(modules)
    for parameter in modules["m"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(step, denominator=1)
    return float((before[0] - values(modules)[0]).mean())


def test_the_schedule_follows_the_global_step():
    assert moved_by_first_step(0, schedule="linear", rewarm_steps=0) == pytest.approx(1.0)
    assert moved_by_first_step(50, schedule="linear", rewarm_steps=0) == pytest.approx(0.5)
    assert moved_by_first_step(0, warmup_steps=10) == pytest.approx(0.1)


def test_fresh_moments_warm_up_again_but_not_at_the_start_of_the_run():
    steady = {"schedule": "constant", "rewarm_steps": 4}
    assert moved_by_first_step(0, **steady) == pytest.approx(1.0)
    assert moved_by_first_step(20, **steady) == pytest.approx(0.25)


def rates_after(optimizer, modules, steps):
    """The rate of each step of plain SGD, read off a gradient of one."""
    rates = []
    for step in steps:
        before = values(modules)[0]
        for pair in modules.values():
            for parameter in pair:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step(step, denominator=1)
        rates.append(round(float((before - values(modules)[0]).mean()), 4))
    return rates


def test_a_replaced_module_climbs_back_over_the_rewarm_steps():
    terms = OptimizerTerms(
        name="sgd",
        learning_rate=1.0,
        schedule="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        rewarm_steps=4,
    )
    modules = {"m": factors()}
    optimizer = started(terms, **modules)
    assert rates_after(optimizer, modules, range(3)) == [1.0, 1.0, 1.0]
    modules = {"m": factors(1)}
    optimizer.follow(modules)
    assert rates_after(optimizer, modules, range(3, 9)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_replacing_one_module_leaves_the_others_moments():
    alone, both = {"kept": factors()}, {"kept": factors(), "other": factors(1)}
    undisturbed, disturbed = started(**alone), started(**both)
    for step in range(6):
        if step == 3:
            both["other"] = factors(2, rank=4)
            disturbed.follow(both)
        for modules in (alone, both):
            give_gradients({"kept": modules["kept"]}, step)
        undisturbed.step(step, denominator=1)
        disturbed.step(step, denominator=1)
    close(values(alone), values({"kept": both["kept"]}))


def test_a_module_without_a_gradient_is_left_alone():
    modules = {"m": factors(), "idle": factors(1)}
    optimizer = started(**modules)
    run(optimizer, modules, range(2))
    before = values({"idle": modules["idle"]})
    give_gradients({"m": modules["m"]}, 9)
    optimizer.step(2, denominator=1)
    assert all(map(torch.equal, values({"idle": modules["idle"]}), before))


def test_gradients_are_consumed():
    modules = {"m": factors()}
    optimizer = started(**modules)
    run(optimizer, modules, [0])
    assert all(parameter.grad is None for parameter in modules["m"])
    assert optimizer.step(1, denominator=1) == 0.0


def test_a_gradient_that_is_not_finite_changes_nothing():
    modules = {"m": factors()}
    optimizer = started(**modules)
    run(optimizer, modules, range(2))
    before, state = values(modules), optimizer.state()
    give_gradients(modules, 5)
    modules["m"][0].grad[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="step 2 are not finite"):
        optimizer.step(2, denominator=1)
    assert all(map(torch.equal, values(modules), before))
    assert all(np.array_equal(optimizer.state()[key], array) for key, array in state.items())
    assert modules["m"][0].grad is None


def test_a_step_without_target_tokens_is_an_error():
    modules = {"m": factors()}
    optimizer = started(**modules)
    with pytest.raises(NumericsError, match="step 4 has no target tokens"):
        optimizer.step(4, denominator=0)


def test_nothing_to_optimise_is_no_error():
    assert started().step(0, denominator=7) == 0.0
    assert started().state() == {}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("saved_after", [0, 2])
def test_a_restored_optimizer_goes_on_as_if_nothing_happened(name, saved_after):
    terms = OptimizerTerms(name=name, learning_rate=0.1, rewarm_steps=4)
    modules = {"m": factors()}
    optimizer = started(terms, **modules)
    run(optimizer, modules, range(10, 10 + saved_after))
    copies = {n: tuple(nn.Parameter(p.detach().clone()) for p in m) for n, m in modules.items()}
    resumed = started(terms, **copies)
    resumed.restore(optimizer.state())
    rest = range(10 + saved_after, 16)
    run(optimizer, modules, rest)
    run(resumed, copies, rest)
    assert all(map(torch.equal, values(modules), values(copies)))


def test_restoring_an_older_state_forgets_newer_moments():
    modules = {"m": factors()}
    optimizer = started(**modules)
    state, start = optimizer.state(), values(modules)
    run(optimizer, modules, range(3))
    first = values(modules)
    with torch.no_grad():
        for parameter, value in zip(modules["m"], start, strict=True):
            parameter.copy_(value)
    optimizer.restore(state)
    run(optimizer, modules, range(3))
    assert all(map(torch.equal, values(modules), first))


def test_a_state_is_arrays_that_safetensors_holds(tmp_path):
    from safetensors.numpy import load_file, save_file

    modules = {"model.layers.1.q_proj": factors()}
    optimizer = started(**modules)
    run(optimizer, modules, range(2))
    state = optimizer.state()
    save_file(state, tmp_path / "optimizer.safetensors")
    run(optimizer, modules, range(2, 4))
    optimizer.restore(load_file(tmp_path / "optimizer.safetensors"))
    restored = optimizer.state()
    assert restored.keys() == state.keys()
    assert all(np.array_equal(restored[name], array) for name, array in state.items())


@pytest.mark.parametrize("others", [{"other": factors()}, {"m": factors(rank=3)}, {}])
def test_a_state_of_other_adapters_is_refused(others):
    modules = {"m": factors()}
    optimizer = started(**modules)
    run(optimizer, modules, range(1))
    with pytest.raises(StorageError):
        started(**others).restore(optimizer.state())
