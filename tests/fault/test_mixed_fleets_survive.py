"""Law 6 where devices compute without torch: the same bits, whatever happens on the way.

Two of three devices compute with onnx, and c, which is what goes wrong here, is one of them. The
yardstick is the same fleet undisturbed; what torch alone comes to is looked at once, for the rest
see tests/equivalence/test_mixed_fleet.py.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shared.errors import NumericsError
from shared.protocol.tensors import pack, unpack
from tests.fault.test_a_device_is_lost import LOST, STEP, share_of, trains
from tests.fault.test_poison_is_left_out import PAIR, apart, listen, poison, refusals
from tests.support.faults import DISTURBANCES, KINDS, RandomFaults, Rule, ScriptedFaults
from tests.support.outcomes import (
    LINES,
    PATIENT,
    TOLERANCE,
    backend_of,
    difference,
    outcome_of,
    trio,
)

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

LIGHT = "ac"
mixed = partial(trio, without_torch=LIGHT)


@pytest.fixture
def calm(undisturbed):
    """Return what gives the outcome of the same fleet without a fault."""
    return partial(undisturbed, without_torch=LIGHT)


def back(sim, device):
    """Start a device again, with nothing of what it knew."""
    return sim.add_device(device, lines=LINES, backend=backend_of(device, LIGHT))


# --- the network ----------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "hand_back"), [("device", "residual"), ("server", "merge")])
def test_lost_doubled_late_and_reordered_messages_change_nothing(
    labels, hand_back, tmp_path, calm, undisturbed
):
    settings = {"labels": labels, "hand_back": hand_back}
    faults = RandomFaults(7, kinds=frozenset(KINDS), **DISTURBANCES["all"])
    sim = mixed(tmp_path, faults=faults, rules=PATIENT, **settings)
    sim.run()
    assert difference(outcome_of(sim), calm(**settings)) == 0.0
    assert outcome_of(sim).losses == calm(**settings).losses
    assert 0.0 < difference(outcome_of(sim), undisturbed(**settings)) <= TOLERANCE["adamw"]


def test_several_micro_batches_in_flight_change_the_rounding_only(tmp_path, calm):
    settings = {"optimizer": "sgd", "micro_batch": 1}
    faults = RandomFaults(3, kinds=frozenset(KINDS), **DISTURBANCES["all"])
    sim = mixed(tmp_path, faults=faults, rules=PATIENT, in_flight=4, **settings)
    sim.run()
    assert difference(outcome_of(sim), calm(**settings)) <= TOLERANCE["sgd"]


# --- the device -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The outcome where nothing of `STEP` ever left device c."""
    silent = Rule(partial(trains, device="c", step=STEP), nth=None)
    folder = tmp_path_factory.mktemp("without")
    sim = mixed(folder, rules=LOST, faults=ScriptedFaults([silent]))
    sim.run(until=lambda: silent.seen > 0)
    sim.vanish("c")
    sim.run()
    return outcome_of(sim)


def test_what_a_vanished_device_did_of_an_open_step_is_dropped_whole(without, tmp_path, calm):
    sim = mixed(tmp_path, rules=LOST)
    sim.run_to(f"round 2, step {STEP}")
    sim.run(until=lambda: share_of(sim, "c"))
    sim.vanish("c")
    sim.run()
    assert difference(outcome_of(sim), without) == 0.0
    assert outcome_of(sim).losses == without.losses
    assert outcome_of(sim).tokens["c"] < calm().tokens["c"]


def test_a_device_that_died_may_come_back_for_the_next_round(tmp_path):
    sims = [mixed(tmp_path / name, rounds=3) for name in ("once", "twice")]
    for sim, deaths in zip(sims, (1, 2), strict=True):
        sim.run_to(f"round 2, step {STEP}")
        sim.run(until=partial(share_of, sim, "c"))
        sim.vanish("c")
        for death in range(deaths):
            returned = back(sim, "c")
            if death + 1 < deaths:
                sim.run_for(1.0)
                returned.transport.vanish()
                returned.gone = True
        sim.run()
        assert returned.error is None
    once, twice = (outcome_of(sim) for sim in sims)
    assert difference(twice, once) == 0.0
    assert sims[0].metrics()[-1]["device/c/perplexity"] > 1


@pytest.mark.parametrize("how", ["not a number", "too wide"])
def test_a_device_that_is_sent_a_bad_gradient_drops_out_whole(how, without, tmp_path, monkeypatch):
    sim = mixed(tmp_path, rules=LOST)
    backend = sim.devices["c"].parts.backend
    backward = backend.backward

    def first_is_bad(key, gradient):
        # The last one of a step comes when the server has all of the step already.
        bad = (key.step, key.index) == (STEP, 0)
        backward(key, spoilt(gradient, how) if bad else gradient)

    monkeypatch.setattr(backend, "backward", first_is_bad)
    sim.run()
    assert isinstance(sim.devices["c"].error, NumericsError)
    assert "gradient of" in str(sim.devices["c"].error)
    assert difference(outcome_of(sim), without) == 0.0


def spoilt(frame, how):
    array = unpack(frame).copy()
    if how == "too wide":
        return pack(np.concatenate([array, array], axis=1))
    array[-1, -1] = np.nan
    return pack(array)


def test_a_poisoned_update_counts_as_one_that_never_came(tmp_path):
    sim = mixed(tmp_path / "poisoned", rounds=1, rules=PAIR)
    listen(sim, "c")
    poison(sim, "c")
    sim.run()
    assert refusals(sim, "c") == ["outlier"]
    assert sim.devices["c"].error is None, "it waits for the next round"
    silent = Rule(lambda p: p.kind == "adapter" and p.sender.startswith("c-"), nth=None)
    lost = mixed(tmp_path / "lost", rounds=1, rules=PAIR, faults=ScriptedFaults([silent]))
    lost.run(until=lambda: silent.seen > 0)
    lost.vanish("c")
    lost.run()
    assert apart(sim, lost) == 0.0


# --- the coordinator ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "phase"), [("device", "round 1, step 0"), ("server", "round 2, step 3")]
)
def test_a_coordinator_that_restarts_changes_nothing(labels, phase, tmp_path, calm):
    sim = mixed(tmp_path, labels=labels)
    sim.run_to(phase)
    sim.run_for(0.35)
    sim.restart_coordinator()
    sim.run()
    assert difference(outcome_of(sim), calm(labels=labels)) == 0.0
    assert outcome_of(sim).losses == calm(labels=labels).losses
