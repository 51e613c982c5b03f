"""Laws of the planner: near the optimum, within memory, the same sequences whatever the fleet."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from coordinator.planning.adapter_sizes import lora_key
from coordinator.planning.planner import FleetPlan, plan_fleet
from coordinator.planning.rank_policy import LADDER, ranks_by_importance
from shared.errors import PlanError
from shared.terms import LoraTerms, TrainingTerms
from tests.support import brute_force
from tests.support.fleets import Machine, conditions, device, llama

MODEL = llama(3)
MIB = 2**20


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


machines = st.builds(
    Machine,
    speed=powers(-1.5, 0.3),
    uplink=powers(5.5, 8),
    downlink=powers(5.5, 8),
    round_trip_s=powers(-3.5, -1),
    memory_bytes=st.none() | st.integers(260, 700).map(lambda mib: mib * MIB),
)
servers = st.builds(Machine, speed=powers(-1, 1))
labels = st.sampled_from(["device", "server"])


def fleet(some, **changes):
    return [device(f"d{index}", one, MODEL, **changes) for index, one in enumerate(some)]


def planned(devices, server, labels_, **changes) -> FleetPlan:
    training = TrainingTerms(max_length=128, labels=labels_)
    return plan_fleet(devices, conditions(MODEL, server=server, training=training, **changes))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(some=st.lists(machines, min_size=2, max_size=2), server=servers, labels_=labels)
def test_a_small_fleets_step_is_within_one_percent_of_the_best_of_all_plans(some, server, labels_):
    devices = fleet(some, batch=3, micro_batch=2)
    try:
        found = planned(devices, server, labels_)
    except PlanError:
        reject()
    there = [one for one in devices if one.device_id in found.plans]
    run = conditions(MODEL, server=server, training=TrainingTerms(max_length=128, labels=labels_))
    assert found.predicted_step_s <= 1.01 * brute_force.best_step_s(there, run)


@settings(deadline=None, max_examples=60)
@given(some=st.lists(machines, min_size=1, max_size=6), server=servers, labels_=labels)
def test_every_device_is_planned_or_refused_and_nobody_needs_more_than_it_has(
    some, server, labels_
):
    devices = fleet(some)
    try:
        found = planned(devices, server, labels_)
    except PlanError as error:
        reason = str(error)
        found = None
    if found is None:
        assert all(one.device_id in reason for one in devices)
        return
    assert found.plans.keys() ^ found.refused.keys() == {one.device_id for one in devices}
    assert found.plans.keys() == found.reasons.keys() == found.prediction.devices.keys()
    assert sum(plan.batch for plan in found.plans.values()) == 4 * len(found.plans)
    for one in devices:
        plan = found.plans.get(one.device_id)
        if plan is None:
            assert one.device_id in found.refused[one.device_id]
            continue
        assert 1 <= plan.micro_batch <= plan.batch
        assert 1 <= plan.in_flight <= 2
        limit = one.memory_limit_bytes
        assert limit is None or found.prediction.devices[one.device_id].memory_bytes <= limit


@settings(deadline=None, max_examples=30)
@given(
    some=st.lists(machines, min_size=2, max_size=4), server=servers, labels_=labels, more=machines
)
def test_more_memory_for_everybody_makes_no_step_longer(some, server, labels_, more):
    try:
        before = planned(fleet(some), server, labels_)
    except PlanError:
        reject()
    assume(not before.refused)
    richer = [dataclasses.replace(one, memory_bytes=None) for one in some]
    after = planned(fleet(richer), server, labels_)
    assert after.predicted_step_s <= 1.02 * before.predicted_step_s, "but for the last percent"


@settings(deadline=None, max_examples=30)
@given(some=st.lists(machines, min_size=2, max_size=4), server=servers, labels_=labels)
def test_balanced_batches_are_no_slower_than_equal_ones(some, server, labels_):
    try:
        equal = planned(fleet(some), server, labels_, balance_batches=False)
        balanced = planned(fleet(some), server, labels_)
    except PlanError:
        reject()
    assert {plan.batch for plan in equal.plans.values()} == {4}
    assume(equal.refused == balanced.refused)
    assert balanced.predicted_step_s <= 1.02 * equal.predicted_step_s


features = st.dictionaries(
    st.sampled_from([f"h.{block}.{name}" for block in range(4) for name in ("q", "v", "up")]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    min_size=1,
)


@given(features=features, data=st.data())
def test_ranks_keep_the_budget_and_leave_nothing_that_a_better_module_could_use(features, data):
    scores = data.draw(st.fixed_dictionaries({name: st.floats(0, 10) for name in features}))
    budget = data.draw(st.integers(0, 200_000))
    ranks = ranks_by_importance(scores, features, budget_parameters=budget)
    assert ranks.keys() == features.keys()
    spent = sum(rank * sum(features[name]) for name, rank in ranks.items())
    assert spent <= budget
    for name, rank in ranks.items():
        assert rank in LADDER
        assert rank <= min(features[name])
        larger = [step for step in LADDER if rank < step <= min(features[name])]
        if larger and scores[name] > 0:
            assert spent + (larger[0] - rank) * sum(features[name]) > budget


@given(score=st.floats(0.1, 10), more=st.floats(1.01, 10), budget=st.integers(0, 20_000))
def test_of_equal_modules_the_more_important_never_gets_less(score, more, budget):
    features = {"a": (64, 64), "b": (64, 64), "c": (64, 64)}
    scores = {"a": score, "b": score * more, "c": score}
    ranks = ranks_by_importance(scores, features, budget_parameters=budget)
    assert ranks["b"] >= max(ranks["a"], ranks["c"])


@pytest.mark.parametrize("change", [{"r": 4}, {"rank_pattern": {"q": 2}}, {"lora_alpha": 3.0}])
def test_terms_that_differ_have_keys_that_differ(change):
    assert lora_key(LoraTerms()) == lora_key(LoraTerms())
    assert lora_key(LoraTerms()) != lora_key(dataclasses.replace(LoraTerms(), **change))
