"""A device whose updates are far beyond the others': refused, told, and in the end left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shared.errors import NumericsError, RefusedError
from shared.protocol.messages import Refusal
from tests.support.closeness import largest, relative
from tests.support.faults import Rule, ScriptedFaults
from tests.support.outcomes import LINES, PLANS, TOLERANCE, USUAL, outcome_of, trio

POISON = 1e4
PAIR = {**USUAL, "min": 2, "expected": 3}


def poison(sim, device, *, first=1, last=10**6, factor=POISON):
    """Let a device hand in ``factor`` times what it trained, from its ``first`` to ``last``."""
    backend = sim.devices[device].parts.backend
    adapters = backend.adapters
    handed_in = []

    def poisoned():
        handed_in.append(device)
        pairs = adapters()
        if not first <= len(handed_in) <= last:
            return pairs
        return {name: replace(one, b_OR=one.b_OR * factor) for name, one in pairs.items()}

    backend.adapters = poisoned


def apart(sim, other):
    mine, its = outcome_of(sim).updates, outcome_of(other).updates
    assert mine.keys() == its.keys()
    return largest(relative(mine[module], one) for module, one in its.items())


def norm_of(outcome):
    return np.sqrt(sum(np.linalg.norm(update) ** 2 for update in outcome.updates.values()))


def refusals(sim, device):
    """Return the codes of all refusals that went to a device that was listened to."""
    return [answer.code for answer in sim.devices[device].refusals]


def listen(sim, device):
    """Keep what the coordinator refuses this device."""
    sim.devices[device].refusals = heard = []
    conversation = sim.devices[device].agent._conversation
    handle = conversation._handle_message

    def handling(message):
        if isinstance(message, Refusal):
            heard.append(message)
        handle(message)

    conversation._handle_message = handling


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_poisoned_update_counts_as_one_that_never_came(labels, tmp_path):
    """Both runs have the gradients of c in the server's part, bit for bit."""
    sim = trio(tmp_path / "poisoned", labels=labels, rounds=1, rules=PAIR)
    listen(sim, "c")
    poison(sim, "c")
    sim.run()
    assert refusals(sim, "c") == ["outlier"]
    assert "times the median of 3 updates" in sim.devices["c"].refusals[0].reason
    assert sim.devices["c"].error is None, "it waits for the next round"

    silent = Rule(lambda p: p.kind == "adapter" and p.sender.startswith("c-"), nth=None)
    faults = ScriptedFaults([silent])
    lost = trio(tmp_path / "lost", labels=labels, rounds=1, rules=PAIR, faults=faults)
    lost.run(until=lambda: silent.seen > 0)
    lost.vanish("c")
    lost.run()
    assert apart(sim, lost) == 0.0
    assert outcome_of(sim).tokens == outcome_of(lost).tokens


def test_without_the_rule_that_update_is_nearly_all_of_the_model(tmp_path, undisturbed):
    sim = trio(tmp_path, rounds=1, outlier_factor=None)
    listen(sim, "c")
    poison(sim, "c")
    sim.run()
    assert refusals(sim, "c") == []
    assert norm_of(outcome_of(sim)) > 100 * norm_of(undisturbed(rounds=1))


@pytest.mark.parametrize(("hand_back", "rounds"), [("residual", 1), ("merge", 4)])
def test_a_poisoner_that_trains_alone_leaves_the_run_as_it_is_without_it(
    hand_back, rounds, tmp_path
):
    """It holds the whole model, so nothing else of it is in the others' work either.

    Several rounds with `merge` only: `residual` hands a module to two holders in other factors
    than it leaves to one, and those train on differently.
    """
    plans = {**PLANS, "c": {"split_layer": 4, "r": 2}}
    settings = {
        "rounds": rounds,
        "optimizer": "sgd",
        "rules": PAIR,
        "plans": plans,
        "hand_back": hand_back,
    }
    sim = trio(tmp_path / "poisoned", **settings)
    listen(sim, "c")
    poison(sim, "c")
    sim.run()
    assert "outlier" in refusals(sim, "c")
    without = trio(tmp_path / "without", devices="ab", **settings)
    without.run()
    assert apart(sim, without) < TOLERANCE["sgd"]
    assert outcome_of(sim).tokens["a"] == outcome_of(without).tokens["a"]
    assert outcome_of(sim).tokens.get("c", 0) == 0


def test_after_three_in_a_row_a_device_is_out_and_the_others_finish(tmp_path):
    sim = trio(tmp_path, rounds=9, rules=PAIR)
    listen(sim, "c")
    poison(sim, "c")
    sim.run()
    assert refusals(sim, "c") == ["outlier", "outlier", "left_out"]
    assert isinstance(sim.devices["c"].error, RefusedError)
    assert "3 updates in a row" in str(sim.devices["c"].error)
    for device in "ab":
        assert sim.devices[device].error is None
    assert outcome_of(sim).perplexity < sim.reporter.summary().perplexity_before


def test_a_device_that_is_left_out_is_refused_again_under_the_same_id(tmp_path):
    sim = trio(tmp_path, rounds=9, rules=PAIR)
    poison(sim, "c")
    sim.run(until=lambda: sim.devices["c"].error is not None)
    again = sim.add_device("c", lines=LINES)
    sim.run()
    assert isinstance(again.error, RefusedError)
    assert "3 updates in a row" in str(again.error)


def test_one_bad_round_is_forgiven(tmp_path):
    sim = trio(tmp_path, rounds=9, rules=PAIR)
    listen(sim, "c")
    poison(sim, "c", last=2)
    sim.run()
    assert refusals(sim, "c") == ["outlier", "outlier"]
    assert sim.devices["c"].error is None
    assert sim.metrics()[-1]["device/c/perplexity"] > 1


def test_one_that_was_away_when_its_update_was_refused_hears_of_it_when_it_is_back(tmp_path):
    late = Rule(lambda p: p.kind == "adapter" and p.sender.startswith("a-"), (9.0,), nth=1)
    sim = trio(tmp_path, rounds=3, rules=PAIR, faults=ScriptedFaults([late]))
    poison(sim, "c")
    sim.run(until=lambda: "c" in _delivered(sim))
    sim.vanish("c")
    returned = sim.add_device("c", lines=LINES)
    (name,) = [name for name, device in sim.devices.items() if device is returned]
    listen(sim, name)
    sim.run()
    assert refusals(sim, name) == ["outlier"]
    assert returned.error is None


def _delivered(sim):
    driver = sim.coordinator._driver
    return set() if driver is None else set(driver.round.delivered)


def test_a_restart_of_the_coordinator_forgets_no_refusal(tmp_path):
    sim = trio(tmp_path, rounds=9, rules=PAIR)
    poison(sim, "c")
    sim.run(until=lambda: sim.screening.state()["outliers"]["in_a_row"] == {"c": 2})
    sim.restart_coordinator()
    sim.run()
    assert isinstance(sim.devices["c"].error, RefusedError)
    assert "3 updates in a row" in str(sim.devices["c"].error)


def test_updates_that_are_no_numbers_count_too(tmp_path):
    """The agent stops at each of these; its owner starts it again."""
    sim = trio(tmp_path, rounds=9, rules=PAIR)
    poison(sim, "c", factor=float("nan"))
    sim.run(until=lambda: sim.devices["c"].error is not None)
    errors = [sim.devices["c"].error]
    while not isinstance(errors[-1], RefusedError):
        assert isinstance(errors[-1], NumericsError)
        returned = sim.add_device("c", lines=LINES)
        (name,) = [name for name, device in sim.devices.items() if device is returned]
        poison(sim, name, factor=float("nan"))
        sim.run(until=lambda device=returned: device.error is not None)
        errors.append(returned.error)
    assert len(errors) == 4
    sim.run()
