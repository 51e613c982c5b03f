"""A device that dies, falls behind or has a double: the others go on, and nothing is half counted.

The yardstick of a step that a device did not finish is a run in which nothing of that step
ever left it.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shared.errors import NumericsError, RefusedError
from shared.protocol.messages import Activations, RoundResult
from shared.protocol.tensors import TensorFrame, pack, unpack
from tests.support.faults import Rule, ScriptedFaults
from tests.support.outcomes import LINES, USUAL, difference, outcome_of, trio
from tests.support.traffic import message_in

LOST = {**USUAL, "min": 2, "expected": 3}
STEP = 3
"""The second step of round 2."""


def trains(parcel, *, device, step):
    """Tell whether this is a training micro-batch of the device, of the step or a later one."""
    if parcel.kind != "activations" or not parcel.sender.startswith(f"{device}-"):
        return False
    message = message_in(parcel.payload)
    return isinstance(message, Activations) and message.purpose == "train" and message.step >= step


def share_of(sim, device):
    """Tell whether the server has gradients of the device's open step."""
    return sim.model.trainer is not None and device in sim.model.trainer._sums


@pytest.fixture(scope="module", params=["device", "server"])
def without(request, tmp_path_factory):
    """How labels are kept, and the outcome where nothing of `STEP` ever left device c."""
    silent = Rule(partial(trains, device="c", step=STEP), nth=None)
    folder = tmp_path_factory.mktemp("without")
    sim = trio(folder, labels=request.param, rules=LOST, faults=ScriptedFaults([silent]))
    sim.run(until=lambda: silent.seen > 0)
    sim.vanish("c")
    sim.run()
    return request.param, outcome_of(sim)


def test_what_a_vanished_device_did_of_an_open_step_is_dropped_whole(
    without, tmp_path, undisturbed
):
    labels, expected = without
    sim = trio(tmp_path, labels=labels, rules=LOST)
    sim.run_to(f"round 2, step {STEP}")
    sim.run(until=lambda: share_of(sim, "c"))
    sim.vanish("c")
    sim.run()
    outcome = outcome_of(sim)
    assert difference(outcome, expected) == 0.0
    assert outcome.losses == expected.losses
    assert outcome.tokens["c"] < undisturbed(labels=labels).tokens["c"]
    assert difference_of_updates(outcome, undisturbed(labels=labels)) > 1e-4


def difference_of_updates(one, other):
    return max(float(np.abs(one.updates[m] - other.updates[m]).max()) for m in other.updates)


def test_what_a_device_handed_in_before_it_vanished_stays(tmp_path, undisturbed):
    late = Rule(lambda p: p.kind == "adapter" and p.sender.startswith("a-"), (1.0,), nth=1)
    sim = trio(tmp_path, rules=LOST, rounds=1, faults=ScriptedFaults([late]))
    sim.run(until=lambda: "b" in handed_in(sim))
    assert "a" not in handed_in(sim), "the round must still be open"
    sim.vanish("b")
    sim.run()
    expected = undisturbed(rounds=1)
    assert outcome_of(sim).tokens == expected.tokens
    assert difference_of_updates(outcome_of(sim), expected) == 0.0


def handed_in(sim):
    driver = sim.coordinator._driver
    return set() if driver is None else set(driver.round.delivered)


def test_a_device_that_died_may_come_back_for_the_next_round(tmp_path):
    sims = [trio(tmp_path / name, rounds=3) for name in ("once", "twice")]
    for sim, deaths in zip(sims, (1, 2), strict=True):
        sim.run_to("round 2, step 3")
        sim.run(until=partial(share_of, sim, "c"))
        sim.vanish("c")
        for death in range(deaths):
            returned = sim.add_device("c", lines=LINES)
            if death + 1 < deaths:
                sim.run_for(1.0)
                returned.transport.vanish()
                returned.gone = True
        sim.run()
        assert returned.error is None
    once, twice = (outcome_of(sim) for sim in sims)
    assert difference(twice, once) == 0.0
    third_round = [line for line in sims[0].metrics() if line["round"] == 3]
    assert "device/c/target_tokens" in third_round[-2]
    assert third_round[-1]["device/c/perplexity"] > 1


def test_a_straggler_is_left_out_and_comes_back(tmp_path):
    """It falls behind in the middle of a step; what it sent then comes when it is back."""
    late = Rule(partial(trains, device="c", step=STEP), (74.0,), nth=None)
    rules = {**USUAL, "step_timeout_s": 60.0}
    straggling = trio(tmp_path / "s", rounds=3, rules=rules, faults=ScriptedFaults([late]))
    straggling.run(until=lambda: late.seen > 0)
    straggling.run_for(66.0)
    assert straggling.coordinator.phase == "waiting for devices"
    late.delays_s = (0.0,)
    straggling.run_to("round 3, step 4")
    late.nth = 0
    straggling.run()
    assert straggling.devices["c"].error is None

    silent = Rule(partial(trains, device="c", step=STEP), nth=None)
    dead = trio(tmp_path / "d", rounds=3, faults=ScriptedFaults([silent]))
    dead.run(until=lambda: silent.seen > 0)
    dead.vanish("c")
    silent.nth = 0
    dead.add_device("c", lines=LINES)
    dead.run()
    assert difference(outcome_of(straggling), outcome_of(dead)) == 0.0


def test_a_second_agent_with_an_id_in_use_is_refused_and_the_first_goes_on(tmp_path, undisturbed):
    sim = trio(tmp_path)
    sim.run_to("round 1, step 1")
    second = sim.add_device("b", lines=LINES, seed=99)
    sim.run()
    assert isinstance(second.error, RefusedError)
    assert "another agent is connected as 'b'" in str(second.error)
    assert sim.devices["b"].error is None
    assert difference(outcome_of(sim), undisturbed()) == 0.0


def test_a_second_agent_takes_over_where_the_first_is_dead(tmp_path):
    sim = trio(tmp_path)
    sim.run_to("round 1, step 1")
    second = sim.add_device("b", lines=LINES)
    sim.vanish("b")
    sim.run()
    assert second.error is None
    assert outcome_of(sim).tokens["b"] > 0


# --- what a device itself sends wrong -----------------------------------------------------------


def spoilt(frame, how):
    array = unpack(frame).copy()
    if how == "not a number":
        array[0, 0] = np.nan
        return pack(array)
    if how == "infinite":
        array[-1, -1] = np.inf
        return pack(array)
    if how == "of another dtype":
        return pack(array, "float16")
    if how == "too wide":
        return pack(np.concatenate([array, array], axis=1))
    return TensorFrame(frame.dtype, (frame.shape[0] - 1, frame.shape[1]), frame.data[128:])


@pytest.mark.parametrize(
    "how", ["not a number", "infinite", "of another dtype", "too wide", "too short"]
)
def test_a_device_with_bad_activations_is_told_why_and_drops_out_whole(how, without, tmp_path):
    labels, expected = without
    sim = trio(tmp_path, labels=labels, rules=LOST)
    backend = sim.devices["c"].parts.backend
    forward = backend.forward

    def second_is_bad(key, batch, *, train):
        frame = forward(key, batch, train=train)
        return spoilt(frame, how) if train and (key.step, key.index) == (STEP, 1) else frame

    backend.forward = second_is_bad
    sim.run()
    assert isinstance(sim.devices["c"].error, NumericsError)
    assert f"c, step {STEP}, micro-batch 1" in str(sim.devices["c"].error)
    assert difference(outcome_of(sim), expected) == 0.0


@pytest.mark.parametrize("without", ["device"], indirect=True)
@pytest.mark.parametrize("how", ["not a number", "of another dtype", "too wide"])
def test_a_device_with_a_bad_head_gradient_drops_out_whole(how, tmp_path, without):
    _, expected = without
    sim = trio(tmp_path, rules=LOST)
    backend = sim.devices["c"].parts.backend
    head = backend.head

    def second_is_bad(key, hidden, *, train):
        loss, frame = head(key, hidden, train=train)
        bad = train and (key.step, key.index) == (STEP, 1)
        return loss, spoilt(frame, how) if bad else frame

    backend.head = second_is_bad
    sim.run()
    assert isinstance(sim.devices["c"].error, NumericsError)
    assert difference(outcome_of(sim), expected) == 0.0


@pytest.fixture(scope="module")
def not_delivered(tmp_path_factory):
    """The outcome where c trains to the end of round 2, but never hands in."""

    def hands_in(parcel):
        if parcel.kind != "adapter" or not parcel.sender.startswith("c-"):
            return False
        message = message_in(parcel.payload)
        return isinstance(message, RoundResult) and message.round == 2

    silent = Rule(hands_in, nth=None)
    folder = tmp_path_factory.mktemp("not-delivered")
    sim = trio(folder, rules=LOST, faults=ScriptedFaults([silent]))
    sim.run(until=lambda: silent.seen > 0)
    sim.vanish("c")
    sim.run()
    return outcome_of(sim)


def replaced_pair(pairs, **factors):
    name = sorted(pairs)[1]
    pair = pairs[name]
    new = type(pair)(factors.get("a", pair.a_RI), factors.get("b", pair.b_OR), pair.scaling)
    return {**pairs, name: new}


BAD_ADAPTERS = {
    "not a number": lambda p: replaced_pair(p, b=np.full_like(p[sorted(p)[1]].b_OR, np.nan)),
    "another rank": lambda p: replaced_pair(
        p, a=p[sorted(p)[1]].a_RI[:-1], b=p[sorted(p)[1]].b_OR[:, :-1]
    ),
    "another shape": lambda p: replaced_pair(p, a=p[sorted(p)[1]].a_RI[:, :-1]),
    "one missing": lambda p: {name: p[name] for name in sorted(p)[1:]},
    "one too many": lambda p: {**p, "transformer.h.3.attn.c_attn": p[min(p)]},
}


@pytest.mark.parametrize("how", BAD_ADAPTERS)
def test_a_device_with_a_bad_adapter_is_told_why_and_the_others_lose_nothing(
    how, tmp_path, not_delivered
):
    sim = trio(tmp_path, rules=LOST)
    backend = sim.devices["c"].parts.backend
    adapters = backend.adapters
    handed_in = []

    def second_is_bad():
        handed_in.append(adapters())
        return BAD_ADAPTERS[how](handed_in[-1]) if len(handed_in) == 2 else handed_in[-1]

    backend.adapters = second_is_bad
    sim.run()
    assert isinstance(sim.devices["c"].error, NumericsError)
    assert "transformer.h." in str(sim.devices["c"].error)
    assert difference(outcome_of(sim), not_delivered) == 0.0
