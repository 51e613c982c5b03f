"""What a run remembers of its devices, and what follows: plans, slowdowns, importance, places."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from coordinator.fleet import STATE, Fleet, Observations
from coordinator.importance import Measured
from coordinator.registry import Member
from coordinator.settings import CoordinatorSettings
from shared.errors import StorageError
from shared.protocol.messages import DeviceId, DeviceProfile, SessionId
from shared.protocol.profile import Telemetry
from tests.support.fleets import SHAPE, Machine, llama

BLOCKS = 6
MODEL = llama(BLOCKS)
FAST, SLOW, SERVER = Machine(speed=1.0), Machine(speed=0.5), Machine(speed=8.0)
STEPS = 10


def fleet(*, server=SERVER, **plan):
    settings = CoordinatorSettings(
        run={"id": "r"},
        model={"name": "m"},
        plan={"batch": 8, **plan},
        rounds={"count": 20, "steps": STEPS},
        lora={"r": 8, "target_modules": ["q_proj", "v_proj"]},
        training={"max_length": 128},
    )
    return Fleet(settings, MODEL, measure_server=lambda *_: server.measured(MODEL))


def member(name, machine):
    profile = DeviceProfile(
        backend="torch", hsplit_version="0", sequences=9, evaluation_sequences=0
    )
    made = Member(DeviceId(name), SessionId("0" * 16), profile, 0.0, 0.0)
    made.data, made.measurements = SHAPE, machine.measured(MODEL)
    return made


def joined(known, *members):
    """Plan for these members together, as a coordinator does when all are ready."""
    found = known.plan(members, others=[])
    for one in members:
        one.plan, one.fresh = found.plans[one.device_id], False
    return found


def train(known, members, *, slower=(), importance=()):
    """Let a round pass in which ``slower`` devices take three times as long as predicted."""
    expected = known.latest.prediction.devices
    compute = {
        one.device_id: (3 if one.device_id in slower else 1)
        * STEPS
        * expected[one.device_id].compute_s
        for one in members
    }
    seen = Observations(
        steps=STEPS,
        progress=0.1,
        compute_s=compute,
        server_busy_s=STEPS * known.latest.prediction.server_s,
        importance=importance,
    )
    return known.observe(seen)


def test_devices_whose_part_is_stated_need_not_measure_themselves():
    known = fleet(devices={"stated": {"split_layer": 2}}, micro_batch=3)
    assert known.measure_at(DeviceId("stated")) is None
    assert known.measure_at(DeviceId("planned")) == 3
    assert fleet(split_layer=2).measure_at(DeviceId("any")) is None


def test_the_server_measures_itself_once_and_only_if_somebody_is_planned():
    asked = []
    known = fleet(devices={"stated": {"split_layer": 2}})
    known._measure_server = lambda *size: asked.append(size) or FAST.measured(MODEL)
    stated = member("stated", FAST)
    stated.measurements = None
    known.plan([stated], others=[])
    assert asked == []
    joined(known, member("a", FAST))
    joined(known, member("b", FAST))
    assert asked == [(4, 100)]


def test_nothing_changes_while_everybody_is_as_fast_as_was_planned():
    known = fleet()
    members = [member("a", FAST), member("b", SLOW)]
    joined(known, *members)
    for round_ in range(1, 8):
        assert not train(known, members)
        assert known.replan(members, others=[], round_=round_, steps_left=100) == {}


def test_a_device_that_becomes_slow_gets_less_at_once_and_the_others_more():
    known = fleet()
    a, b = members = [member("a", FAST), member("b", FAST)]
    joined(known, *members)
    before = {one.device_id: one.plan.batch for one in members}
    train(known, members, slower=["b"])
    changed = known.replan(members, others=[], round_=1, steps_left=100)
    assert changed["b"].batch < before["b"]
    assert changed["a"].batch > before["a"]
    assert changed["a"].batch + changed["b"].batch == sum(before.values())
    a.plan, b.plan = changed["a"], changed["b"]
    train(known, members)  # as the new plan predicts: it counts with the slow device
    assert known.replan(members, others=[], round_=2, steps_left=90) == {}
    assert known._planned_with["b"] == pytest.approx(3.0)


def test_who_is_not_waiting_keeps_its_part_and_counts_as_load():
    known = fleet()
    members = [member(name, FAST) for name in "abc"]
    joined(known, *members)
    taken = members[2].plan.batch
    train(known, members, slower=["b"])
    changed = known.replan(members[:2], others=members[2:], round_=1, steps_left=100)
    assert changed.keys() <= {"a", "b"}
    assert sum(one.batch for one in changed.values()) == 3 * 8 - taken


def test_so_does_one_that_lost_its_memory():
    known = fleet(server=SLOW)  # so that much is left to the devices
    roomy = Machine(memory_bytes=900_000_000)
    members = [member("a", roomy), member("b", roomy)]
    joined(known, *members)
    held = members[1].plan.split_layer
    assert held > 1
    members[1].telemetry = Telemetry(free_memory_bytes=10_000_000, used_memory_bytes=390_000_000)
    train(known, members)
    changed = known.replan(members, others=[], round_=1, steps_left=100)
    assert changed["b"].split_layer < held


def test_a_little_less_free_memory_is_no_reason():
    known = fleet(server=SLOW)
    roomy = Machine(memory_bytes=900_000_000)
    members = [member("a", roomy), member("b", roomy)]
    needed = int(joined(known, *members).prediction.devices["b"].memory_bytes)
    tight = replace(members[1].measurements, memory_bytes=round(needed * 1.02))
    members[1].measurements = tight
    members[1].telemetry = Telemetry(free_memory_bytes=round(needed * 0.98), used_memory_bytes=1)
    train(known, members)
    assert known.replan(members, others=[], round_=1, steps_left=100) == {}


def report(weights):
    """Return an importance report in which block j of q_proj matters ``weights[j]``."""
    return {
        f"model.layers.{block}.self_attn.{name}": Measured(
            weights[block] if name == "q_proj" else 1.0, 100
        )
        for block in range(BLOCKS)
        for name in ("q_proj", "v_proj")
    }


def test_ranks_follow_importance_on_devices_and_server_with_the_same_parameters():
    known = fleet()
    members = [member("a", FAST), member("b", FAST)]
    joined(known, *members)
    before = members[0].plan
    assert set(before.ranks.values()) == {8}
    uniform, _ = known.server_ranks(range(BLOCKS))
    assert train(known, members, importance=[report([900.0, 1, 1, 1, 1, 900.0])])
    changed = known.replan(members, others=[], round_=1, steps_left=100)
    after = changed["a"]
    assert after.split_layer == before.split_layer
    important = "model.layers.0.self_attn.q_proj"
    assert after.ranks[important] > 8
    assert parameters(after.ranks) <= parameters(before.ranks)
    assert after.scalings[important] == before.scalings[important]
    guided, _ = known.server_ranks(range(BLOCKS))
    assert guided["model.layers.5.self_attn.q_proj"] > uniform["model.layers.5.self_attn.q_proj"]


def parameters(ranks):
    return sum(rank * sum(MODEL.features(module)) for module, rank in ranks.items())


def test_importance_is_probed_now_and_then_where_ranks_may_move():
    known = fleet(probe_every=3, probe_sequences=5)
    assert known.probe_sequences(1) == 0  # nothing is planned yet
    joined(known, member("a", FAST))
    assert [known.probe_sequences(round_) for round_ in range(1, 6)] == [5, 0, 0, 5, 0]
    for settings in ({"ranks": "uniform"}, {"probe_sequences": 0}):
        other = fleet(**settings)
        joined(other, member("a", FAST))
        assert other.probe_sequences(1) == 0


def test_a_changed_batch_neither_repeats_sequences_nor_leaves_any_out():
    known = fleet()
    one = member("a", FAST)
    joined(known, one)
    one.plan = replace(one.plan, batch=8)
    assert known.position(one, 0) == 0
    assert known.position(one, 10) == 80
    one.plan = replace(one.plan, batch=3)
    assert known.position(one, 20) == 160
    assert known.position(one, 30) == 190


def test_what_it_learnt_goes_through_a_checkpoint():
    known = fleet()
    one = member("a", FAST)
    joined(known, one)
    known.position(one, 0)
    train(known, [one], importance=[report([900.0, 1, 1, 1, 1, 900.0])])
    known.replan([one], others=[], round_=1, steps_left=100)
    state = json.loads(json.dumps(known.state()))
    again = fleet()
    again.resume(state)
    assert again.state() == known.state()
    one.plan = replace(one.plan, batch=3)
    assert again.position(one, 10) == 80  # with the batch that it had, and not 30
    blocks = range(BLOCKS)
    assert again.server_ranks(blocks) == known.server_ranks(blocks) != fleet().server_ranks(blocks)
    again.resume({})  # of a version that knew no fleet
    with pytest.raises(StorageError, match="damaged"):
        again.resume({STATE: {"positions": {"a": {"step": 1}}}})


def test_who_was_given_less_for_the_rest_of_the_run_has_less_after_a_restart_too():
    known = fleet()
    one = member("a", FAST)
    joined(known, one)
    before = one.plan
    known.lighten(one)
    again = fleet()
    again.resume(json.loads(json.dumps(known.state())))
    joined(again, one)
    assert one.plan.split_layer <= max(1, before.split_layer // 2)
    assert one.plan.batch == before.batch // 2
    with pytest.raises(StorageError, match="damaged"):
        again.resume({STATE: {**known.state()[STATE], "most": {"a": [1]}}})
