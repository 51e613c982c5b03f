"""Which updates are refused, and what a device that sends such ones can expect."""

from __future__ import annotations

import json

import pytest

from coordinator.outliers import (
    MOST_REFUSALS,
    ROUNDS_REMEMBERED,
    LeftOutError,
    OutlierError,
    Screening,
    limit,
    outliers,
)
from shared.errors import StorageError


def adapters(**sizes):
    return {device: {"adapters": size} for device, size in sizes.items()}


def judged(screening, **sizes):
    return set(screening.judge(adapters(**sizes)))


def test_the_limit_follows_the_median_and_its_deviation():
    assert limit([1.0, 1.0, 1.0], factor=10) == pytest.approx(1 + 10 * 0.5)
    assert limit([1.0, 2.0, 3.0], factor=10) == pytest.approx(2 + 10 * 1.4826)
    assert limit([1.0, 1.2, 1.4, 1e6], factor=10) == pytest.approx(1.3 + 10 * 0.65)


def test_too_few_sizes_and_no_movement_say_nothing():
    assert limit([1.0, 100.0], factor=10) is None
    assert limit([0.0, 0.0, 100.0], factor=10) is None
    assert outliers({"a": 1.0, "b": 1e9}, [], factor=10) == {}


def test_the_reason_holds_both_numbers():
    (reason,) = outliers({"a": 1.0, "b": 1.0, "c": 500.0}, [], factor=10).values()
    assert reason == "500 times the median of 3 updates, at most 6 times are taken"


def test_earlier_rounds_are_asked_only_where_this_one_is_too_small():
    assert set(outliers({"a": 1.0, "b": 50.0}, [1.1, 0.9], factor=10)) == {"b"}
    assert set(outliers({"a": 1.0, "b": 1.0, "c": 50.0}, [99.0] * 9, factor=10)) == {"c"}


def test_what_more_than_half_of_a_round_does_is_no_outlier():
    assert outliers({"a": 90.0, "b": 99.0, "c": 1.0}, [], factor=10) == {}
    assert outliers({"a": 90.0}, [1.0, 1.0, 1.0], factor=10) == {}
    assert set(outliers({"a": 1.0, "b": 99.0}, [1.0, 1.0, 1.0], factor=10)) == {"b"}


def test_only_accepted_sizes_are_remembered_and_for_some_rounds_only():
    screening = Screening(10.0)
    assert judged(screening, a=1.0, b=1.0, c=100.0) == {"c"}
    assert judged(screening, a=1.0, c=100.0) == {"c"}
    for _ in range(ROUNDS_REMEMBERED):
        judged(screening, a=90.0)  # alone, nobody can tell
    assert judged(screening, a=90.0, c=100.0) == set()


def test_a_classifier_is_judged_by_itself():
    screening = Screening(10.0)
    sizes = {
        device: {"adapters": 1.0, "classifier": 1e5 if device == "b" else 2.0} for device in "abc"
    }
    assert set(screening.judge(sizes)) == {"b"}
    assert "classifier" in screening.judge(sizes)["b"]


def test_without_a_factor_nobody_is_refused():
    assert judged(Screening(None), a=1.0, b=1.0, c=1e30) == set()


def test_three_refusals_in_a_row_leave_a_device_out_and_an_accepted_update_forgives():
    screening = Screening(10.0)
    for _ in range(MOST_REFUSALS - 1):
        judged(screening, a=1.0, b=1.0, c=100.0)
    judged(screening, a=1.0, b=1.0, c=1.0)
    for _ in range(MOST_REFUSALS - 1):
        judged(screening, a=1.0, b=1.0, c=100.0)
    screening.check("c")
    screening.offended("c")  # NaN counts as well
    for _ in range(2):
        with pytest.raises(LeftOutError, match="3 updates in a row"):
            screening.check("c")
    screening.check("a")


def test_a_round_without_a_device_neither_counts_nor_forgives():
    screening = Screening(10.0)
    for _ in range(MOST_REFUSALS):
        screening.check("c")
        judged(screening, a=1.0, b=1.0, c=100.0)
        judged(screening, a=1.0, b=1.0, d=1.0)
    assert screening.is_left_out("c")


def test_what_is_owed_is_said_once():
    screening = Screening(10.0)
    screening.owe("c", "too large")
    screening.check("a")
    with pytest.raises(OutlierError, match="too large"):
        screening.check("c")
    screening.check("c")


def test_a_restart_changes_no_verdict():
    screening, again = Screening(10.0), Screening(10.0)
    for _ in range(2):
        judged(screening, a=1.0, b=1.0, c=100.0)
    again.resume(json.loads(json.dumps(screening.state())))
    assert again.state() == screening.state()
    assert judged(again, a=1.0, c=100.0) == judged(screening, a=1.0, c=100.0) == {"c"}
    assert again.is_left_out("c")


def test_a_checkpoint_from_before_this_existed_is_taken_and_a_damaged_one_is_not():
    Screening(10.0).resume({})
    rows = ({"a": "x"}, {"a": float("inf")}, [])
    for damaged in ([], {"accepted": 3}, *({"accepted": [], "in_a_row": row} for row in rows)):
        with pytest.raises(StorageError, match="verdicts"):
            Screening(10.0).resume({"outliers": damaged})
