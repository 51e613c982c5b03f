"""The runner: the same text for all methods, bytes that add up, time that follows speeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

import pytest

from coordinator import demo, strategies
from coordinator.settings import CoordinatorSettings
from shared.architecture import ModelArchitecture
from shared.costs import fit
from tests.support import fleets
from tests.testbed.comparison import compare, runner
from tests.testbed.comparison.fleet import FLEET, Machine, slowed
from tests.testbed.comparison.methods import EQUAL_RANK, METHODS
from tests.testbed.comparison.results import MethodRun, Point
from tests.testbed.comparison.runner import Job

JOB = Job(
    method="hsplitlora", seed=3, rounds=1, steps=2, batch=2, learning_rate=5e-3, alpha=None,
    held_out=20,
)  # fmt: skip
ARCHITECTURE = ModelArchitecture.from_config(
    json.loads((demo.base_folder() / "config.json").read_text())
)
MEASURED = fleets.Machine(speed=20.0).measured(ARCHITECTURE)
MACHINE = Machine(agent=dataclasses.replace(MEASURED, link=None), server=MEASURED)
ADAPTER_BYTES = 4 * EQUAL_RANK * 192 * (1 + 3 + 1 + 1 + 1 + 4 + 4 + 1) * 6


def ran(folder, method, **changes) -> MethodRun:
    folder.mkdir()
    return runner.run(dataclasses.replace(JOB, method=method, **changes), MACHINE, folder)


def test_every_method_learns_on_the_same_text_and_every_line_is_used_once(tmp_path):
    texts = {}
    for method in ("hsplitlora", "flora"):
        folder = tmp_path / method
        folder.mkdir()
        job = dataclasses.replace(JOB, method=method)
        paths = runner.texts(job, folder, count=5)
        texts[method] = [[path.read_text().splitlines() for path in pair] for pair in paths]
    assert texts["hsplitlora"] == texts["flora"]
    training = [line for own, _ in texts["flora"] for line in own]
    shipped = [line for s in demo.shards() for line in s.training.read_text().splitlines()]
    assert sorted(training) == sorted(shipped)
    assert sum(len(held_out) for _, held_out in texts["flora"]) == 20


def test_unequal_mixtures_are_unequal_and_nobody_is_without_text(tmp_path):
    job = dataclasses.replace(JOB, alpha=0.1)
    lines = [pair[0].read_text().splitlines() for pair in runner.texts(job, tmp_path, count=5)]
    assert min(map(len, lines)) >= 4
    japanese = [sum("food : Japanese" in line for line in own) / len(own) for own in lines]
    assert max(japanese) > 3 * (min(japanese) + 0.01)


def test_without_a_cut_bytes_are_those_of_adapters_and_time_is_the_slowest_devices(tmp_path):
    one = ran(tmp_path / "run", "fedlora")
    assert set(one.split_layers.values()) == {6}
    assert [point.step for point in one.points] == [0, 2]
    assert [point.bytes for point in one.points] == [5 * ADAPTER_BYTES, 15 * ADAPTER_BYTES]
    slowest = fit(slowed(MACHINE.agent, FLEET[-1].speed))
    parameters = ADAPTER_BYTES // 4

    def step_s(tokens):
        shape = {"blocks": 6, "tokens": tokens, "adapter_parameters": parameters}
        compute_s = slowest.forward_s(**shape) + slowest.backward_s(**shape)
        return (
            compute_s
            + slowest.head_s(tokens=tokens)
            + slowest.optimizer_s(adapter_parameters=parameters)
        )

    link = FLEET[-1].link
    exchange_s = 2 * (ADAPTER_BYTES / link.uplink_bytes_per_s + link.round_trip_s / 2)
    took = one.points[1].seconds - one.points[0].seconds
    assert exchange_s + 2 * step_s(2 * 40) < took < exchange_s + 2 * step_s(2 * 128)
    assert math.isfinite(one.points[1].perplexity)


def test_a_planned_fleet_is_planned_as_in_a_run_and_counts_what_is_exchanged(tmp_path):
    one = ran(tmp_path / "run", "hsplitlora")
    assert one.kind == "strategy"
    assert set(one.split_layers) == {device.name for device in FLEET}
    assert max(one.split_layers.values()) < 6
    assert one.ranks["d1"] >= one.ranks["d5"]
    hidden = 4 * 2 * 192  # both ways there and back, in bfloat16
    tokens = (one.points[1].bytes - one.points[0].bytes) / hidden
    # 2 steps and a probe of 8 sequences of each device, and some adapters.
    assert 2 * 10 * 40 < tokens < (2 * 10 + 5 * 8) * 128 + 3 * 5 * ADAPTER_BYTES / hidden
    assert one.rounds[0].aggregation_error < 1e-6


def test_centralised_lora_is_one_machine_with_all_of_the_text(tmp_path):
    one = ran(tmp_path / "run", "cenlora")
    assert one.split_layers == {"server": 6}
    assert one.points[-1].bytes == 0
    assert one.kind == "reference"


def test_a_machine_that_was_measured_is_taken_as_it_was(tmp_path):
    file = tmp_path / "machine.json"
    file.write_bytes(compare.MACHINE.dump_json(MACHINE))
    assert compare.machine_of(file, tmp_path) == MACHINE


def test_all_methods_have_as_many_adapter_parameters():
    assert sum(device.rank for device in FLEET) == len(FLEET) * EQUAL_RANK


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_that_a_run_takes(name):
    settings = runner._settings(JOB, METHODS[name])
    taken = {"model": {"name": "m"}, **settings}
    applied = strategies.applied(CoordinatorSettings(**taken), block_count=6)
    row = strategies.STRATEGIES[applied.strategy]
    assert applied.aggregation.hand_back in row.hand_backs
    assert (applied.plan.split_layer == 6) == (row.cut == "none")


def test_with_several_learning_rates_each_method_has_its_best():
    options = argparse.Namespace(
        methods=["fedlora", "flora"], learning_rates=[1e-3, 1e-2, 1.0], rounds=1, steps=1, batch=1,
        alpha=None, held_out=10,
    )  # fmt: skip
    perplexity = {
        ("fedlora", 1e-3): 30.0, ("fedlora", 1e-2): 20.0, ("fedlora", 1.0): math.nan,
        ("flora", 1e-3): 10.0, ("flora", 1e-2): 20.0, ("flora", 1.0): math.inf,
    }  # fmt: skip

    def run_all(jobs):
        assert {job.seed for job in jobs} == {compare.TUNING_SEED}
        for job in reversed(jobs):
            yield job, outcome(job, perplexity[job.method, job.learning_rate])

    assert compare._tuned(run_all, options) == {"fedlora": 1e-2, "flora": 1e-3}


def outcome(job, perplexity) -> MethodRun:
    point = Point(step=1, seconds=1.0, bytes=1, perplexity=perplexity, loss=1.0)
    return MethodRun(
        method=job.method, seed=job.seed, kind="strategy", split_layers={}, ranks={},
        points=(point,), rounds=(), peak_memory_bytes={}, peak_memory="predicted",
    )  # fmt: skip
