"""Accuracy and F1 from whole counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.scores import scores_of
from shared.class_counts import ClassCount, check_counts, counted, total
from shared.errors import NumericsError

CLASSES = 3
choices = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)))


def counts_of(pairs, classes=CLASSES):
    return counted([a for a, _ in pairs], [p for _, p in pairs], classes=classes)


def test_two_classes_are_scored_by_the_second_as_mrpc_is():
    # 68 of 100 are equivalent; always saying so is right for 68, and has the F1 of GLUE's
    # majority baseline: 2 * 68 / (68 + 100).
    scores = scores_of(counts_of([(1, 1)] * 68 + [(0, 1)] * 32, classes=2))
    assert scores is not None
    assert scores.accuracy == pytest.approx(0.68)
    assert scores.f1 == pytest.approx(136 / 168)
    assert scores.f1_macro == pytest.approx(68 / 168)


def test_a_textbook_confusion_matrix():
    pairs = [(0, 0)] * 5 + [(0, 1)] * 2 + [(1, 1)] * 3 + [(1, 2)] + [(2, 2)] * 4 + [(2, 0)]
    scores = scores_of(counts_of(pairs))
    assert scores is not None
    assert scores.accuracy == pytest.approx(12 / 16)
    by_class = (2 * 5 / (7 + 6), 2 * 3 / (4 + 5), 2 * 4 / (5 + 5))
    assert scores.f1 == scores.f1_macro == pytest.approx(sum(by_class) / 3)


def test_nothing_classified_has_no_scores():
    assert scores_of(()) is None
    assert scores_of(counts_of([])) is None


def test_a_class_that_never_occurs_and_is_never_chosen_counts_as_0():
    scores = scores_of(counts_of([(0, 0), (1, 1)]))
    assert scores is not None
    assert scores.f1_macro == pytest.approx(2 / 3)


@given(st.lists(choices, max_size=5))
def test_counts_of_devices_add_up_to_those_of_all_examples(devices):
    everything = [pair for pairs in devices for pair in pairs]
    parts = [counts_of(pairs) for pairs in devices if pairs]
    assert total(parts) == (counts_of(everything) if everything else ())


@given(choices)
def test_what_was_counted_passes_the_check(pairs):
    counts = counts_of(pairs) if pairs else ()
    check_counts(counts, classes=CLASSES, examples=len(pairs))


GOOD = ClassCount(actual=2, predicted=1, true_positives=1)
OTHER = ClassCount(actual=1, predicted=2, true_positives=1)


@pytest.mark.parametrize(
    ("counts", "classes", "examples", "says"),
    [
        ((GOOD, OTHER), 3, 3, "counts of 2 classes, where the run has 3"),
        ((GOOD, OTHER), 0, 3, "counts of 2 classes"),
        ((), 2, 3, "counts of 0 classes"),
        ((GOOD, OTHER), 2, 0, "counts of 2 classes"),
        ((GOOD, OTHER), 2, 4, "where 4 were evaluated"),
        ((GOOD, GOOD), 2, 4, "examples, where 4"),
        ((ClassCount(actual=0, predicted=1, true_positives=1), GOOD), 2, 2, "true positives"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, classes, examples, says):
    with pytest.raises(NumericsError, match=says):
        check_counts(counts, classes=classes, examples=examples)


def test_counts_of_different_numbers_of_classes_do_not_add_up():
    with pytest.raises(NumericsError, match="counts of 2 classes, and others of 3"):
        total([(GOOD, OTHER), (GOOD, OTHER, OTHER)])
