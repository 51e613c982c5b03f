"""From measured sums to scores: who counts how much, what history weighs, what is refused."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.importance import (
    MOST_HISTORY,
    Importance,
    Measured,
    add,
    from_device,
    history_weight,
    theta,
)
from shared.errors import NumericsError, ProtocolError, StorageError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
CANDIDATES = (Q, V)

values = st.floats(0, 1e6)
scores = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), values)


def test_a_module_that_several_measured_is_weighted_by_their_tokens():
    nano = {Q: Measured(10.0, 100)}
    orin = {Q: Measured(90.0, 300), V: Measured(6.0, 300)}
    measured = theta([nano, orin])
    assert measured[Q] == pytest.approx(100.0 / 400)
    assert measured[V] == pytest.approx(6.0 / 300)


def test_what_nobody_measured_has_no_score():
    assert theta([{Q: Measured(0.0, 0)}, {}]) == {}


@given(st.lists(st.tuples(values, st.integers(0, 1000)), max_size=4), st.randoms())
def test_the_order_of_reports_changes_nothing(pairs, random):
    reports = [{Q: Measured(value, tokens)} for value, tokens in pairs]
    shuffled = random.sample(reports, len(reports))
    assert theta(reports) == pytest.approx(theta(shuffled))


def test_adding_takes_modules_of_either():
    assert add({Q: Measured(1.0, 2)}, {Q: Measured(3.0, 4), V: Measured(5.0, 6)}) == {
        Q: Measured(4.0, 6),
        V: Measured(5.0, 6),
    }


def test_a_devices_report_is_taken_as_it_is():
    assert from_device({Q: 2.5}, 7, candidates=CANDIDATES) == {Q: Measured(2.5, 7)}
    assert from_device({}, 0, candidates=CANDIDATES) == {}
    assert from_device({Q: 0.0}, 0, candidates=CANDIDATES) == {Q: Measured(0.0, 0)}


@pytest.mark.parametrize(
    ("value", "tokens"), [(math.nan, 7), (math.inf, 7), (-0.1, 7), (1.0, 0), (1.0, -3)]
)
def test_a_report_that_makes_no_sense_is_refused(value, tokens):
    with pytest.raises(NumericsError, match=f"importance of {Q} is"):
        from_device({V: 1.0 if tokens > 0 else 0.0, Q: value}, tokens, candidates=CANDIDATES)


def test_a_report_of_what_is_elsewhere_is_refused():
    with pytest.raises(ProtocolError, match=f"importance of {V} was not asked"):
        from_device({V: 1.0}, 7, candidates=[Q])


def test_the_first_measurement_is_the_score():
    first = Importance({}).updated({Q: 3.0}, progress=0.9)
    assert first.scores == {Q: 3.0}
    assert first.updated({V: 5.0}, progress=0.9).scores == {Q: 3.0, V: 5.0}, "Q was not measured"


def test_at_the_start_the_new_value_is_all():
    assert Importance({Q: 1.0}).updated({Q: 9.0}, progress=0.0).scores == {Q: 9.0}


def test_the_moving_average_is_the_formula():
    gamma = 1 - math.exp(-3.0 * 0.5 / (1 + 2.0))  # |3 - 1| / 1 is 2
    moved = Importance({Q: 1.0}).updated({Q: 3.0}, progress=0.5).scores[Q]
    assert moved == pytest.approx(gamma * 1.0 + (1 - gamma) * 3.0)


def test_history_weighs_more_late_and_less_where_importance_fluctuates():
    late, early = (history_weight(1.0, 1.1, progress=p) for p in (0.9, 0.1))
    volatile = history_weight(1.0, 5.0, progress=0.9)
    assert 0 < early < late <= MOST_HISTORY
    assert volatile < late


@given(values, values, st.floats(0, 1e9))
def test_a_score_stays_between_what_it_was_and_what_was_measured(before, measured, progress):
    assert 0.0 <= history_weight(before, measured, progress=progress) <= MOST_HISTORY
    moved = Importance({Q: before}).updated({Q: measured}, progress=progress).scores[Q]
    low, high = sorted((before, measured))
    assert low * (1 - 1e-12) <= moved <= high * (1 + 1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_nothing_moves_where_a_value_makes_no_sense(value):
    with pytest.raises(NumericsError, match=f"importance of {Q}"):
        Importance({Q: 1.0}).updated({V: 2.0, Q: value}, progress=0.5)


def test_change_is_the_share_that_is_elsewhere_now():
    before = Importance({Q: 3.0, V: 1.0})
    assert before.change(before) == 0.0
    assert Importance({Q: 1.0, V: 3.0}).change(before) == pytest.approx(0.5)
    assert Importance({Q: 0.3, V: 0.1}).change(before) == pytest.approx(0.0), "level is no change"
    assert Importance({"other": 7.0}).change(before) == pytest.approx(1.0)


def test_change_from_and_to_nothing():
    nothing, something = Importance({}), Importance({Q: 1.0})
    assert something.change(nothing) == nothing.change(something) == 1.0
    assert nothing.change(nothing) == 0.0


@given(scores, scores)
def test_change_is_symmetric_and_at_most_one(one, other):
    change = Importance(one).change(Importance(other))
    assert change == pytest.approx(Importance(other).change(Importance(one)))
    assert 0.0 <= change <= 1.0 + 1e-9


@given(scores)
def test_a_checkpoint_brings_it_back(one):
    state = json.loads(json.dumps(Importance(one).state()))
    assert Importance.restored(state) == Importance(one)


@pytest.mark.parametrize(
    "state",
    [{}, {"scores": [1]}, {"scores": {Q: "1"}}, {"scores": {Q: -1}}, {"scores": {Q: 1e999}}],
)
def test_a_damaged_checkpoint_is_refused(state):
    with pytest.raises(StorageError, match="importance"):
        Importance.restored(state)
