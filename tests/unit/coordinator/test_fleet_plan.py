"""What a fleet is given: who is left alone, who is refused, where rank goes, and why."""

from __future__ import annotations

import dataclasses
import re
from types import MappingProxyType

import pytest

from coordinator.planning.planner import plan_fleet
from coordinator.planning.prediction import predict
from shared.errors import PlanError
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, TrainingTerms
from tests.support.fleets import SHAPE, Machine, conditions, device, llama, part

MODEL = llama(8)
FAST, SLOW = DeviceId("fast"), DeviceId("slow")
SERVER = Machine(speed=2.0)
MIB = 2**20


def run(**changes):
    return conditions(MODEL, server=changes.pop("server", SERVER), **changes)


def two(**changes):
    return [
        device("fast", Machine(speed=1.0), MODEL, **changes),
        device("slow", Machine(speed=0.25, uplink=2e6, downlink=2e6), MODEL, **changes),
    ]


def needs(one, split_layer, *, micro_batch=1, rank=8):
    """Return the bytes of a part with this rank in each of its modules."""
    lora = dataclasses.replace(one.terms.lora, r=rank)
    own = part(
        MODEL, split_layer, lora=lora, batch=micro_batch, micro_batch=micro_batch, in_flight=1
    )
    found = predict({one.device_id: own}, [one], run())
    return found.devices[one.device_id].memory_bytes


def limited(machine, limit):
    return dataclasses.replace(machine, memory_bytes=int(limit))


def test_the_faster_device_takes_more_sequences_and_all_take_as_many_as_asked():
    found = plan_fleet(two(), run())
    assert found.plans[FAST].batch > found.plans[SLOW].batch >= 1
    assert found.plans[FAST].batch + found.plans[SLOW].batch == 8
    even = plan_fleet(two(), run(balance_batches=False))
    assert {plan.batch for plan in even.plans.values()} == {4}
    assert found.predicted_step_s < even.predicted_step_s


def test_a_stated_choice_stays_and_the_others_are_still_planned():
    devices = two()
    devices[0] = device("fast", Machine(), MODEL, batch=5, batch_is_stated=True, split_layer=3)
    found = plan_fleet(devices, run())
    assert (found.plans[FAST].split_layer, found.plans[FAST].batch) == (3, 5)
    assert found.plans[SLOW].batch == 4
    assert str(found.reasons[FAST]) == "k = 3: as the settings say"
    stated = plan_fleet(two(micro_batch=3, micro_batch_is_stated=True), run())
    assert {plan.micro_batch for plan in stated.plans.values()} <= {1, 2, 3}


def test_a_stated_split_layer_is_taken_though_it_does_not_fit():
    tight = limited(Machine(), 260 * MIB)
    found = plan_fleet([device("fast", tight, MODEL, split_layer=6)], run())
    assert found.plans[FAST].split_layer == 6
    assert found.plans[FAST].batch == 4


def test_without_measurements_what_is_stated_is_taken_and_the_rest_estimated():
    stated = dataclasses.replace(
        device("fast", Machine(), MODEL, split_layer=2, lora=LoraTerms(r=3)), measurements=None
    )
    guessed = dataclasses.replace(device("slow", Machine(), MODEL), measurements=None)
    found = plan_fleet([stated, guessed], run())
    plan = found.plans[FAST]
    assert (plan.split_layer, plan.batch, plan.micro_batch, plan.in_flight) == (2, 4, 2, 2)
    assert set(plan.ranks.values()) == {3}
    assert found.plans[SLOW].split_layer == 2, "a quarter of the blocks"
    assert found.reasons[SLOW].kind == "estimated"
    assert not found.prediction.devices, "nothing is known of either"
    assert found.prediction.server_s > 0, "but the server's part is"


def test_a_pinned_device_keeps_its_part_and_counts_as_load():
    before = plan_fleet(two(), run()).plans
    pinned = dataclasses.replace(two()[0], pinned=before[FAST])
    found = plan_fleet([pinned, two()[1]], run())
    assert found.plans[FAST] is before[FAST]
    assert found.reasons[FAST].kind == "kept"
    assert found.plans[SLOW].batch == 8 - before[FAST].batch
    more = dataclasses.replace(before[FAST], batch=100)
    crowded = plan_fleet([dataclasses.replace(pinned, pinned=more), two()[1]], run())
    assert crowded.plans[SLOW].batch == 1, "never none"


def test_a_slower_device_than_it_measured_gets_less():
    before = plan_fleet(two(), run())
    tired = dataclasses.replace(two()[0], slowdown=4.0)
    after = plan_fleet([tired, two()[1]], run())
    assert work(after.plans[FAST]) < work(before.plans[FAST])
    assert after.predicted_step_s > before.predicted_step_s


def work(plan):
    return plan.split_layer * plan.batch


def test_a_slower_server_leaves_more_to_the_devices():
    relieved = plan_fleet(two(), run(training=TrainingTerms(max_length=128, labels="server")))
    burdened = plan_fleet(
        two(),
        run(training=TrainingTerms(max_length=128, labels="server"), server_slowdown=20.0),
    )

    def load(found):
        return sum((8 - plan.split_layer) * plan.batch for plan in found.plans.values())

    assert load(burdened) < load(relieved)


def test_nothing_is_planned_that_a_device_could_not_prepare():
    devices = [dataclasses.replace(one, most_blocks=2) for one in two()]
    found = plan_fleet(devices, run())
    assert {plan.split_layer for plan in found.plans.values()} <= {1, 2}
    none = [dataclasses.replace(one, most_blocks=0) for one in two()]
    with pytest.raises(PlanError, match="fast could not prepare even one block.*slow could not"):
        plan_fleet(none, run())


# --- memory ---------------------------------------------------------------------------------------


def test_the_smallest_word_about_memory_holds():
    machine = limited(Machine(), 10**9)
    one = device("fast", machine, MODEL, memory_limit_bytes=700 * MIB)
    assert one.memory_limit_bytes == 700 * MIB
    declared = dataclasses.replace(one, declared_limit_bytes=600 * MIB)
    assert declared.memory_limit_bytes == 600 * MIB
    assert device("fast", Machine(), MODEL).memory_limit_bytes is None


def test_who_fits_nothing_is_refused_by_name_with_both_numbers_and_the_others_go_on():
    tight = limited(Machine(), 200 * MIB)
    devices = [device("fast", tight, MODEL), two()[1]]
    found = plan_fleet(devices, run())
    assert found.plans.keys() == {SLOW}
    assert found.plans[SLOW].batch == 4, "what was asked of the refused one is not put upon others"
    least = needs(devices[0], 1, rank=1) / MIB
    assert "fast may use 200 MiB, but one block" in found.refused[FAST]
    assert f"needs about {least:.0f} MiB" in found.refused[FAST]
    with pytest.raises(PlanError, match=r"no device can take part: fast may use 200 MiB"):
        plan_fleet(devices[:1], run())


def test_exactly_enough_memory_is_enough_and_a_byte_less_costs_rank_or_a_block():
    plain = device("fast", Machine(), MODEL)
    enough = needs(plain, 1)
    fits = device("fast", limited(Machine(), enough + 1), MODEL)
    found = plan_fleet([fits], run())
    assert (found.plans[FAST].split_layer, found.plans[FAST].micro_batch) == (1, 1)
    assert set(found.plans[FAST].ranks.values()) == {8}
    less = device("fast", limited(Machine(), enough - 1), MODEL)
    squeezed = plan_fleet([less], run())
    assert set(squeezed.plans[FAST].ranks.values()) == {4}
    assert "ranks cut to 50.0%" in str(squeezed.reasons[FAST])


def test_where_memory_holds_one_micro_batch_only_one_flies():
    plain = device(
        "fast", Machine(), MODEL, split_layer=8, micro_batch=4, micro_batch_is_stated=True
    )
    limit = needs(plain, 8, micro_batch=4) + 1
    training = TrainingTerms(max_length=128, labels="server")  # with a head of its own it waits
    one = dataclasses.replace(plain, declared_limit_bytes=int(limit))
    found = plan_fleet([one], run(training=training))
    assert found.plans[FAST].in_flight == 1


def test_a_residual_takes_room_and_merge_takes_none():
    limit = int(needs(device("fast", Machine(), MODEL), 6)) + 1
    devices = [device("fast", limited(Machine(speed=10.0), limit), MODEL)]
    slow = Machine(speed=0.01)
    merged = plan_fleet(devices, run(server=slow, hand_back="merge"))
    residual = plan_fleet(devices, run(server=slow, hand_back="residual"))
    assert residual.plans[FAST].split_layer < merged.plans[FAST].split_layer


def test_a_server_without_room_leaves_more_blocks_to_every_device():
    roomy = limited(SERVER, 4000 * MIB)
    tight = limited(SERVER, 520 * MIB)
    fast_link = [device("fast", Machine(speed=0.1), MODEL)]
    assert plan_fleet(fast_link, run(server=roomy)).plans[FAST].split_layer == 1
    pushed = plan_fleet(fast_link, run(server=tight)).plans[FAST].split_layer
    assert pushed > 1
    cannot = [dataclasses.replace(fast_link[0], most_blocks=1)]
    with pytest.raises(PlanError, match="server's memory leaves at least"):
        plan_fleet(cannot, run(server=tight))
    labels = TrainingTerms(max_length=128, labels="server")
    with pytest.raises(PlanError, match="the server may use 100 MiB, but its head alone"):
        plan_fleet(fast_link, run(server=limited(SERVER, 100 * MIB), training=labels))


# --- ranks ----------------------------------------------------------------------------------------


def test_rank_goes_where_importance_is_and_the_parameters_stay():
    devices = two()
    uniform = plan_fleet(devices, run())
    modules = sorted(uniform.plans[FAST].ranks)
    importance = dict.fromkeys(modules, 1.0) | {modules[0]: 100.0}
    guided = plan_fleet(devices, run(), importance=importance)

    def parameters(plan):
        return sum(rank * sum(MODEL.features(name)) for name, rank in plan.ranks.items())

    mine, even = guided.plans[FAST], uniform.plans[FAST]
    assert mine.split_layer == even.split_layer
    assert mine.ranks[modules[0]] == 64 if len(modules) > 8 else mine.ranks[modules[0]] > 8
    assert parameters(mine) <= parameters(even)
    assert parameters(mine) >= 0.8 * parameters(even)
    assert all(scaling == 2.0 for scaling in mine.scalings.values()), "alpha / r of the terms"
    assert mine.scalings.keys() == mine.ranks.keys()


def test_uniform_ranks_ignore_importance_and_zero_ranks_stay_zero():
    lora = LoraTerms(r=8, rank_pattern={"v_proj": 0})
    devices = two(lora=lora)
    names = MODEL.target_modules(LoraTerms(r=8), blocks=range(8))
    importance = {name: float(index) for index, name in enumerate(sorted(names))}
    uniform = plan_fleet(devices, run(ranks="uniform"), importance=importance)
    assert all(set(plan.ranks.values()) == {8} for plan in uniform.plans.values())
    guided = plan_fleet(devices, run(), importance=importance)
    assert not any("v_proj" in name for plan in guided.plans.values() for name in plan.ranks)


# --- reasons --------------------------------------------------------------------------------------


ONE_BY_ONE = {"micro_batch": 1, "micro_batch_is_stated": True}


def why(machine, stated=MappingProxyType({}), **changes):
    found = plan_fleet([device("fast", machine, MODEL, **stated)], run(**changes))
    return found.reasons[FAST]


def test_each_reason_names_what_decided():
    assert why(Machine(speed=100.0)).kind == "whole"
    assert why(Machine(speed=0.01)).kind == "speed"
    assert why(Machine(uplink=1e5, downlink=1e5), training=TrainingTerms(
        max_length=128, labels="server"), server=Machine(speed=50.0)).kind == "link"  # fmt: skip
    limit = needs(device("fast", Machine(), MODEL), 3) + 1
    quick = limited(Machine(speed=100.0, uplink=1e9, downlink=1e9), limit)
    tight = why(quick, ONE_BY_ONE, server=Machine(speed=0.1))
    assert tight.kind == "memory"
    assert "k = 3: memory allows no more (4 with micro-batches of 1 would need" in str(tight)


def test_a_reason_says_what_memory_would_allow_beyond_what_was_chosen():
    limit = needs(device("fast", Machine(), MODEL), 5) + 1
    slow = why(limited(Machine(speed=0.01), limit), ONE_BY_ONE)
    assert (slow.kind, slow.split_layer, slow.allowed) == ("speed", 1, 5)
    assert "memory allows 5 (6 with micro-batches of 1 would need" in str(slow)
    assert "its own speed makes 1 faster" in str(slow)


def test_blocks_that_relieve_a_busy_server_say_so():
    labels = TrainingTerms(max_length=128, labels="server")
    crowd = [device(f"d{i}", Machine(speed=1.0), MODEL) for i in range(6)]
    found = plan_fleet(crowd, run(training=labels, server=Machine(speed=1.5)))
    kinds = {reason.kind for reason in found.reasons.values()}
    assert "server" in kinds
    text = next(str(one) for one in found.reasons.values() if one.kind == "server")
    assert re.search(r"alone \d would be faster, but the server is busy", text)


def test_data_that_nobody_described_is_taken_as_long_as_may_be():
    known = device("fast", Machine(), MODEL)
    unknown = dataclasses.replace(known, data=None)
    plans = plan_fleet([known], run()).plans
    described = predict(plans, [known], run()).devices[FAST]
    assumed = predict(plans, [unknown], run()).devices[FAST]
    assert SHAPE.longest == 128
    assert assumed.compute_s > described.compute_s
    assert assumed.memory_bytes == described.memory_bytes
