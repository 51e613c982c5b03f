import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.report import derived, wording
from coordinator.report.records import Plan, PlannedDevice, Point, RunRecords
from tests.support.run_folders import modules


def records(*, metrics):
    return RunRecords(
        folder_name="run",
        settings={},
        metrics=metrics,
        plans=(),
        importance=(),
        summary=None,
    )


def plan(step, *, ranks=(), predicted_step_s=None, **changes):
    device = PlannedDevice(**{"split_layer": 2, "batch": 8, "ranks": dict(ranks), **changes})
    return Plan(
        time=0.0, round=step, step=step, predicted_step_s=predicted_step_s, devices={"nano": device}
    )


def test_a_steps_seconds_are_from_the_line_before_it_in_its_own_round():
    """Between rounds stand evaluation, hand-back, and whatever time the run was stopped for."""
    points = [Point(t, r, s, 0.0) for t, r, s in [(1, 1, 1), (3, 1, 2), (90, 2, 3), (91, 2, 4)]]
    durations = derived.step_durations(records(metrics={"train/loss": points}))
    assert [(point.step, point.value) for point in durations] == [(2, 2), (4, 1)]


def test_a_step_that_was_not_written_is_in_nobodys_seconds():
    points = [Point(1.0, 1, 1, 0.0), Point(5.0, 1, 3, 0.0)]
    assert derived.step_durations(records(metrics={"train/loss": points})) == []


def test_a_rounds_median_step_stands_in_its_middle():
    points = [Point(float(s * s), 1, s, 0.0) for s in range(1, 6)]  # 3, 5, 7, 9 s
    (median,) = derived.step_medians(records(metrics={"train/loss": points}))
    assert (median.round, median.value) == (1, 6.0)
    assert 2 < median.step < 5


def test_without_lines_for_steps_a_round_is_shared_out_evenly():
    rounds = [Point(10.0, 1, 5, 10.0), Point(30.0, 2, 10, 20.0)]
    medians = derived.step_medians(records(metrics={"round/seconds": rounds}))
    assert [point.value for point in medians] == [2.0, 4.0]


def test_a_plan_that_changes_nothing_is_not_shown_again():
    same, other = plan(0), plan(60, batch=4)
    again = plan(40, predicted_step_s=1.0, reason="the same, in other words")
    assert derived.differing([same, again, other]) == [same, other]


def test_of_two_plans_after_the_same_step_the_later_counts():
    before, again = plan(20), plan(20, batch=4)
    assert derived.differing([plan(0), before, again]) == [plan(0), again]


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("transformer.h.3.attn.c_attn", (3, "attn.c_attn")),
        ("model.layers.31.self_attn.q_proj", (31, "self_attn.q_proj")),
        ("lm_head", None),
    ],
)
def test_a_module_path_says_block_and_kind(module, place):
    assert derived.module_place(module) == place


def test_values_are_arranged_into_kinds_and_blocks_in_the_models_order():
    paths = [f"model.layers.{b}.{kind}" for b in (0, 2, 10) for kind in ("q_proj", "k_proj")]
    found = derived.block_map({paths[0]: 1.0, paths[5]: 6.0, "lm_head": 9.0}, [*paths, "lm_head"])
    assert (found.kinds, found.blocks) == (("q_proj", "k_proj"), (0, 2, 10))
    np.testing.assert_array_equal(found.values_KB, [[1, np.nan, np.nan], [np.nan, np.nan, 6]])


def test_a_modules_rank_is_the_mean_over_the_copies_of_it():
    first, second = modules(range(1))
    found = Plan(
        time=0.0,
        round=1,
        step=0,
        devices={"nano": PlannedDevice(ranks={first: 4}), "orin": PlannedDevice(ranks={first: 8})},
        server_ranks={first: 0, second: 16},
    )
    assert derived.mean_ranks(found) == {first: 4.0, second: 16.0}


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(1, 50))
def test_thinned_points_are_few_and_keep_the_mean(ys, at_most):
    xs, thin = derived.thinned(range(len(ys)), ys, at_most=at_most)
    assert len(xs) == len(thin) == min(len(ys), at_most)
    if ys and len(ys) % len(thin) == 0:
        assert math.isclose(np.mean(thin), np.mean(ys), rel_tol=1e-9, abs_tol=1e-6)


def test_a_gap_among_thinned_points_stays_in_its_place():
    _, thin = derived.thinned(range(6), [1, np.nan, np.nan, np.nan, 5, 7], at_most=3)
    np.testing.assert_array_equal(thin, [1, np.nan, 6])


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60),
    st.integers(0, 10).map(lambda n: 2 * n + 1),
)
def test_a_running_mean_stays_within_what_it_is_the_mean_of(values, window):
    smooth = derived.running_mean(values, window=window)
    assert len(smooth) == len(values)
    assert smooth.min() >= min(values) - 1e-6
    assert smooth.max() <= max(values) + 1e-6


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (12_345, "12.3 kB"),
        (5e8, "500 MB"),
        (1.5e9, "1.50 GB"),
        (None, "–"),
    ],
)
def test_bytes_are_read_with_their_unit(count, words):
    assert wording.bytes_(count) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.25, "0.25 s"), (12.34, "12.3 s"), (250, "4 min 10 s"), (12_000, "3 h 20 min"),
     (200_000, "2 d 7 h"), (math.nan, "–")],
)  # fmt: skip
def test_seconds_are_read_in_the_unit_that_suits_them(value, words):
    assert wording.seconds(value) == words


def test_a_long_name_keeps_both_its_ends():
    assert wording.shortened("jetson-orin-nano-in-the-hall-12") == "jetson-o…e-hall-12"
    assert wording.shortened("nano") == "nano"
