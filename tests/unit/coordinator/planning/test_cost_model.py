"""Where a step's seconds and a part's bytes go, told from a machine whose costs are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.planning.adapter_sizes import SizeBook, residual_growth
from coordinator.planning.cost_book import CostBook
from coordinator.planning.cost_model import SPARE, added, contended_s, stages
from coordinator.planning.prediction import predict
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, TrainingTerms
from tests.support.fleets import (
    BLOCK_BYTES,
    SHAPE,
    STATE_BYTES,
    TOKEN_BLOCK_BYTES,
    Machine,
    conditions,
    device,
    llama,
    part,
)

MODEL = llama(4)
ONE = DeviceId("one")
LINK = Machine(uplink=1e6, downlink=2e6, round_trip_s=0.02)
HIDDEN_BYTES = 512 * 2


def training(labels="device", **changes):
    return TrainingTerms(max_length=128, labels=labels, **changes)


def staged(split_layer, *, labels="device", **changes):
    """Return the stages of a micro-batch of two sequences."""
    run = conditions(MODEL, training=training(labels), **changes)
    one = device("one", LINK, MODEL)
    book = CostBook([one], run)
    return stages(book.of(one), book.server, book.cut(one, split_layer), 2.0)


def bytes_of(split_layer, *, at_once=1, labels="device", lora=None, **changes):
    run = conditions(MODEL, training=training(labels, **changes.pop("terms", {})), **changes)
    one = device("one", LINK, MODEL, lora=lora or LoraTerms(r=8))
    book = CostBook([one], run)
    return float(
        book.of(one).memory_bytes(book.cut(one, split_layer), 2, at_once=at_once) / (1 + SPARE)
    )


def test_a_classifier_on_the_device_is_sent_one_token_of_a_sequence():
    run = conditions(classifying(MODEL), training=training())
    one = device("one", LINK, MODEL)
    book = CostBook([one], run)
    own, words = stages(book.of(one), book.server, book.cut(one, 2), 2.0), staged(2)
    assert (own.up[0], own.down[1]) == (words.up[0], words.down[1])
    assert own.up[1] == pytest.approx(2 * HIDDEN_BYTES / 1e6)
    assert own.down[0] == pytest.approx(2 * HIDDEN_BYTES / 2e6)


def classifying(architecture):
    return dataclasses.replace(architecture, task="classification", class_count=2)


def test_with_labels_on_the_device_a_micro_batch_goes_to_and_fro_twice():
    own = staged(2)
    assert (len(own.compute), len(own.up), len(own.server), len(own.down)) == (3, 2, 2, 2)
    at_server = staged(2, labels="server")
    assert (len(at_server.compute), len(at_server.up), len(at_server.server)) == (2, 1, 1)


def test_the_wire_carries_the_tokens_that_there_are_at_the_links_rates():
    own = staged(2)
    tokens = 2 * SHAPE.mean_length
    assert own.up[0] == pytest.approx(tokens * HIDDEN_BYTES / 1e6)
    assert own.down[0] == pytest.approx(tokens * HIDDEN_BYTES / 2e6)
    assert own.latency_s == pytest.approx(0.01)
    with_labels = staged(2, labels="server")
    assert with_labels.up[0] == pytest.approx(tokens * (HIDDEN_BYTES + 4) / 1e6)


def test_compute_runs_on_padded_tokens():
    """A block of the known machine takes 0.2 ms and 5 us a token, forward."""
    one, two = staged(1), staged(2)
    tokens = 2 * SHAPE.padded_length
    assert two.compute[0] - one.compute[0] == pytest.approx(2e-4 + 5e-6 * tokens, rel=0.05)
    assert two.compute[2] - one.compute[2] == pytest.approx(2 * (2e-4 + 5e-6 * tokens), rel=0.05)


def test_a_block_more_on_the_device_is_one_less_on_the_server():
    one, two = staged(1), staged(2)
    assert added(two.compute) > added(one.compute)
    assert added(two.server) < added(one.server)


def test_a_device_with_the_whole_model_and_head_exchanges_nothing():
    whole = staged(4)
    assert added(whole.up) == added(whole.server) == added(whole.down) == whole.latency_s == 0
    head_elsewhere = staged(4, labels="server")
    assert added(head_elsewhere.up) > 0
    assert added(head_elsewhere.server) > 0, "the head"


def test_a_slower_device_computes_longer_and_sends_as_fast():
    run = conditions(MODEL)
    one = device("one", LINK, MODEL)
    slow = dataclasses.replace(one, slowdown=3.0)
    book = CostBook([one], run)
    cut = book.cut(one, 2)
    before = stages(book.of(one), book.server, cut, 2.0)
    after = stages(book.of(slow), book.server, cut, 2.0)
    assert added(after.compute) == pytest.approx(3 * added(before.compute))
    assert after.optimizer_s == pytest.approx(3 * before.optimizer_s)
    assert after.up == before.up
    assert after.server == before.server


def test_many_devices_at_once_cost_what_each_costs_alone():
    run = conditions(MODEL)
    some = [device(str(speed), Machine(speed=speed), MODEL) for speed in (1.0, 0.5, 0.1)]
    book = CostBook(some, run)
    k, m = np.arange(1, 5), np.array([1, 2, 4])
    costs, cut = book.of_all(some, axes=2), book.cuts(some, k, share=0.5)
    chain_FKM = stages(costs, book.server, cut, m).chain_s
    memory_FKM = costs.memory_bytes(cut, m, at_once=2)
    for row, one in enumerate(some):
        for place, split_layer in enumerate(k):
            own = book.cut(one, int(split_layer), share=0.5)
            alone = stages(book.of(one), book.server, own, 2.0)
            assert chain_FKM[row, place, 1] == pytest.approx(alone.chain_s)
            memory = book.of(one).memory_bytes(own, 2, at_once=2)
            assert memory_FKM[row, place, 1] == pytest.approx(float(memory))


# --- memory ---------------------------------------------------------------------------------------


def test_memory_grows_by_a_blocks_weights_and_what_it_keeps_of_each_token():
    kept = 2 * SHAPE.longest * TOKEN_BLOCK_BYTES
    adapters = STATE_BYTES * 8 * 2 * (512 + 512)
    more = bytes_of(3) - bytes_of(2)
    assert more == pytest.approx(BLOCK_BYTES + kept + adapters, rel=0.05)
    flying = bytes_of(2, at_once=3) - bytes_of(2, at_once=2)
    assert flying == pytest.approx(2 * kept, rel=0.05)


def test_an_adapter_parameter_costs_sixteen_bytes():
    more = bytes_of(2, lora=LoraTerms(r=9)) - bytes_of(2, lora=LoraTerms(r=8))
    assert more == pytest.approx(16 * 2 * 2 * (512 + 512), rel=1e-6)


def test_a_device_that_works_alone_keeps_one_micro_batch_at_a_time():
    assert bytes_of(4, at_once=1) == bytes_of(4, at_once=3)
    assert bytes_of(4, at_once=1, labels="server") < bytes_of(4, at_once=3, labels="server")


def test_a_residual_is_a_second_weight_at_the_most_and_less_while_the_run_is_short():
    dense = 2 * 2 * 512 * 512 * 4
    merged = bytes_of(2, hand_back="merge")
    assert bytes_of(2, hand_back="residual", rounds=1000) - merged == pytest.approx(dense)
    assert bytes_of(2, hand_back="residual", rounds=1) - merged == pytest.approx(
        2 * 2 * 16 * (512 + 512) * 4
    ), "the ranks of one device and of the server"


def test_below_float32_a_residual_stays_factored():
    small = conditions(MODEL, training=training(dtype="bfloat16"), hand_back="residual")
    lora = LoraTerms(r=8)
    factored = SizeBook(small, growth=10**6).of(lora).residual_bytes[-1]
    assert factored == 4 * 2 * 512 * (512 + 512) * 4
    assert residual_growth([device("one", LINK, MODEL)], small) == 5 * (8 + 8)
    assert residual_growth([], dataclasses.replace(small, hand_back="merge")) == 0


# --- predictions ----------------------------------------------------------------------------------


def plan(split_layer=2, *, r=8, **changes):
    return part(MODEL, split_layer, lora=LoraTerms(r=r), **changes)


def predicted(own, machine=LINK, labels="device", **changes):
    run = conditions(MODEL, training=training(labels), **changes)
    return predict({ONE: own}, [device("one", machine, MODEL)], run)


def test_a_predictions_parts_are_those_of_a_step():
    found = predicted(plan()).devices[ONE]
    own = staged(2)
    assert found.compute_s == pytest.approx(2 * added(own.compute) + own.optimizer_s)
    assert found.uplink_s == pytest.approx(2 * added(own.up))
    assert found.downlink_s == pytest.approx(2 * added(own.down))
    assert found.server_s == pytest.approx(2 * added(own.server))
    assert found.own_s >= max(found.compute_s, found.uplink_s)


def test_a_lone_device_takes_its_own_step():
    assert predicted(plan(in_flight=1)).step_s == pytest.approx(
        predicted(plan(in_flight=1)).devices[ONE].own_s, rel=0.02
    )
    whole = predicted(plan(split_layer=4))
    assert whole.step_s == pytest.approx(whole.devices[ONE].own_s)
    assert whole.server_s == 0


def test_the_ranks_of_the_plan_count_and_not_those_of_the_terms():
    few, many = predicted(plan(r=8)).devices[ONE], predicted(plan(r=32)).devices[ONE]
    more = 24 * 2 * 2 * (512 + 512)
    assert many.memory_bytes - few.memory_bytes == pytest.approx((1 + SPARE) * 16 * more)


def test_a_server_that_nobody_measured_costs_nothing():
    run = dataclasses.replace(conditions(MODEL), server=None)
    found = predict({ONE: plan()}, [device("one", LINK, MODEL)], run)
    assert found.server_s == 0
    assert found.devices[ONE].server_s == 0


def test_more_than_can_be_simulated_is_estimated_alike():
    run = conditions(MODEL)
    names = [DeviceId(f"d{index}") for index in range(1001)]
    some = [device(name, Machine(speed=0.1), MODEL) for name in names]
    plans = {name: plan(split_layer=3, in_flight=1) for name in names}
    many = predict(plans, some, run)
    own_s = next(iter(many.devices.values())).own_s
    assert many.step_s == pytest.approx(contended_s(own_s, many.server_s, devices=1001))
    assert many.step_s > own_s
