"""What `RunState` writes: devices, rounds, contributions, and that nothing can count twice."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import pytest

from coordinator.registry import Stage
from coordinator.rounds import CloseStep, MicroBatchDone
from coordinator.run_listener import Start
from coordinator.state import database
from coordinator.state.database import STATE_FILE
from coordinator.state.run_state import LONGEST_REASON, RunState
from shared.errors import QuorumError, StorageError
from shared.protocol.messages import DeviceId, SessionId
from shared.protocol.profile import BlockPoint
from tests.support.fake_clock import FakeClock
from tests.support.measured import measurements
from tests.support.recorded_runs import DEVICES, PLAN, ROUNDS, member, opened, trained

NANO, ORIN = (DeviceId(device) for device in DEVICES)
BOTH = {"nano": (3, 4), "orin": (5,)}


@pytest.fixture
def clock():
    return FakeClock(0.0)


@pytest.fixture
def state(tmp_path, clock):
    with RunState(tmp_path, clock, resumed_round=None) as state:
        for device in DEVICES:
            state.joined(member(device))
        yield state


def rows(tmp_path, query):
    with database.reading(tmp_path / STATE_FILE) as db:
        return [tuple(row) for row in db.execute(query)]


def outcomes(tmp_path):
    found = rows(tmp_path, "SELECT device, outcome, reason FROM participants ORDER BY device")
    return {device: (outcome, reason) for device, outcome, reason in found}


def session(tmp_path, device="nano"):
    (found,) = rows(tmp_path, f"SELECT outcome, reason FROM devices WHERE device = '{device}'")
    return found


def close(state, accepted, tokens, *, error=0.5):
    for device in accepted:
        state.delivered(device)
    state.round_closing(accepted, tokens, error=error)


# --- rounds -------------------------------------------------------------------------------------


def test_a_round_its_steps_and_whose_gradients_are_in_them(tmp_path, state, clock):
    opened(state, 1)
    trained(state, 0, BOTH)
    clock.advance(61.5)
    trained(state, 1, {"nano": (6,)})
    close(state, [ORIN], {NANO: 13, ORIN: 5})
    state.round_closed(1)
    columns = "round, attempt, state, first_step, end_step, opened_at, closed_at, aggregation_error"
    times = ("1970-01-01T00:00:00.000+00:00", "1970-01-01T00:01:01.500+00:00")
    assert rows(tmp_path, f"SELECT {columns} FROM rounds") == [(1, 1, "closed", 0, 2, *times, 0.5)]
    assert rows(tmp_path, "SELECT step, device, target_tokens, micro_batches FROM counted") == [
        (0, "nano", 7, 2),
        (0, "orin", 5, 1),
        (1, "nano", 6, 1),
    ]
    assert rows(tmp_path, "SELECT device, target_tokens FROM participants") == [
        ("nano", 13),
        ("orin", 5),
    ]
    assert outcomes(tmp_path) == {
        "nano": ("lost", "it did not deliver"),
        "orin": ("delivered", None),
    }


def test_what_a_device_did_of_a_step_that_closed_without_it_is_in_none(tmp_path, state):
    opened(state, 1)
    state.micro_batch(MicroBatchDone(NANO, 0, 0, 2, 9))
    trained(state, 0, {"orin": (5,)})
    trained(state, 1, {"orin": (5,)})
    assert {device for (device,) in rows(tmp_path, "SELECT device FROM contributions")} == {"orin"}


def test_until_it_is_confirmed_a_round_is_closing_and_counts_for_nothing(tmp_path, state):
    opened(state, 1)
    trained(state, 0, BOTH)
    close(state, [NANO, ORIN], {})
    assert rows(tmp_path, "SELECT state FROM rounds") == [("closing",)]
    assert rows(tmp_path, "SELECT * FROM counted") == []
    state.round_closed(1)
    assert len(rows(tmp_path, "SELECT * FROM counted")) == 2


def test_each_has_its_plan_its_place_in_its_data_and_what_it_holds(tmp_path, state):
    other = replace(PLAN, split_layer=2, ranks={"h.0.fc": 4, "h.1.fc": 2})
    opened(state, 1)
    close(state, [NANO, ORIN], {})
    state.round_closed(1)
    again = opened(state, 2)
    assert again.first_step == 2
    plans = rows(tmp_path, "SELECT split_layer, batch, micro_batch, in_flight, ranks FROM plans")
    assert plans == [(1, 4, 2, 1, '{"h.0.fc": 4}')], "the same plan is kept once"
    where = rows(
        tmp_path, "SELECT round, first_sequence, alone, fresh FROM participants WHERE device='nano'"
    )
    assert where == [(1, 0, 0, 1), (2, 8, 0, 1)]
    start = start_of(member("nano", plan=other, fresh=False), alone=[NANO])
    state.round_opened(again, start)
    found = rows(
        tmp_path,
        "SELECT split_layer, alone, fresh FROM participants JOIN plans USING (plan) "
        "WHERE (round, attempt) = (2, 2)",
    )
    assert found == [(2, 1, 0)]
    (ranks,) = rows(tmp_path, "SELECT server_ranks FROM rounds WHERE attempt = 2")
    assert json.loads(ranks[0]) == {"h.1.fc": 8}


def start_of(one, *, alone=()):
    positions = {one.device_id: 8}
    return Start(members=[one], alone=alone, positions=positions, server_ranks={"h.1.fc": 8})


def test_a_step_whose_gradient_was_no_number_is_marked(tmp_path, state):
    opened(state, 1)
    state.step_closed(CloseStep(0, (), 0), applied=False)
    close(state, [], {}, error=math.nan)
    assert rows(tmp_path, "SELECT step, applied FROM steps") == [(0, 0)]
    assert rows(tmp_path, "SELECT aggregation_error FROM rounds") == [(None,)]


def test_a_round_that_every_device_left_is_void_and_its_repetition_another_attempt(tmp_path, state):
    opened(state, 1)
    trained(state, 0, BOTH)
    state.gone(member("nano"), "it fell silent")
    state.gone(member("orin"), "it fell silent")
    state.round_void("every device was lost")
    state.joined(member("nano"))
    opened(state, 1, devices=["nano"])
    trained(state, 0, {"nano": (8,)})
    close(state, [NANO], {NANO: 8})
    state.round_closed(1)
    attempts = rows(tmp_path, "SELECT attempt, state, ending FROM rounds")
    assert attempts == [(1, "void", "every device was lost"), (2, "closed", "1 delivered")]
    counted = rows(tmp_path, "SELECT attempt, step, device, target_tokens FROM counted")
    assert counted == [(2, 0, "nano", 8)]
    kept = rows(tmp_path, "SELECT target_tokens FROM contributions WHERE attempt = 1")
    assert kept == [(7,), (5,)]


def test_going_on_from_an_earlier_checkpoint_voids_all_later_rounds(tmp_path, state):
    for number in (1, 2):
        opened(state, number)
        trained(state, 2 * number - 2, BOTH)
        close(state, [NANO, ORIN], {NANO: 7})
        state.round_closed(number)
    opened(state, 3)
    state.round_closed(3)  # the evaluation
    state.close("killed")
    with RunState(tmp_path, FakeClock(), resumed_round=1) as again:
        assert len(rows(tmp_path, "SELECT * FROM counted")) == 4, "nothing happened yet"
        for device in DEVICES:
            again.joined(member(device))
        opened(again, 2)
    states = rows(tmp_path, "SELECT round, attempt, state FROM rounds")
    assert states == [(1, 1, "closed"), (2, 1, "void"), (2, 2, "open"), (3, 1, "void")]
    assert len(rows(tmp_path, "SELECT * FROM counted")) == 2
    void = "SELECT DISTINCT outcome, target_tokens FROM participants JOIN rounds USING "
    assert rows(tmp_path, void + "(round, attempt) WHERE state = 'void'") == [("void", None)]


def test_a_database_older_than_its_checkpoint_is_brought_in_line_with_a_warning(
    tmp_path, state, caplog
):
    opened(state, 1)
    state.close("killed")
    with RunState(tmp_path, FakeClock(), resumed_round=1):
        pass
    assert "is older than the checkpoint of round 1" in caplog.text
    known = "known from its checkpoint alone"
    assert rows(tmp_path, "SELECT state, ending FROM rounds") == [("closed", known)]
    assert {outcome for outcome, _ in outcomes(tmp_path).values()} == {"unknown"}


def test_a_round_that_only_evaluates_needs_no_checkpoint(tmp_path, state):
    opened(state, ROUNDS + 1)
    state.gone(member("orin"), "it fell silent")
    state.round_closed(ROUNDS + 1)
    columns = "state, first_step, end_step, ending"
    assert rows(tmp_path, f"SELECT {columns} FROM rounds") == [
        ("closed", 4, 4, "it only evaluated")
    ]
    assert outcomes(tmp_path) == {"nano": ("evaluated", None), "orin": ("lost", "it fell silent")}


# --- who falls out, and why -----------------------------------------------------------------------


def test_who_is_late_refused_or_lost_is_told_apart(tmp_path, state):
    for device in ("late", "stale", "poison", "gone", "heavy"):
        state.joined(member(device))
    devices = ["late", "stale", "poison", "gone", "heavy", *DEVICES]
    opened(state, 1, devices=devices)
    state.left_out(DeviceId("late"), "left out after 40 s")
    state.refused(member("late"), "stale", "the round goes on without this device")
    state.dropped(DeviceId("late"))
    state.refused(member("stale"), "stale", "step 1 was closed without this micro-batch")
    state.refused(member("poison"), "bad_numbers", "activations of poison: NaN")
    state.gone(member("poison"), "it left")
    state.gone(member("gone"), "it fell silent")
    state.dropped(DeviceId("heavy"))
    state.delivered(NANO)
    state.delivered(ORIN)
    state.gone(member("nano"), "it fell silent")
    state.update_refused(ORIN)
    assert outcomes(tmp_path) == {
        "gone": ("lost", "it fell silent"),
        "heavy": ("lost", "it left the round"),
        "late": ("late", "left out after 40 s"),
        "nano": ("delivered", None),
        "orin": ("refused", "its update was an outlier"),
        "poison": ("refused", "activations of poison: NaN"),
        "stale": ("late", "step 1 was closed without this micro-batch"),
    }


@pytest.mark.parametrize(
    ("code", "outcome"), [("left_out", "left out"), ("does_not_fit", "refused")]
)
def test_who_is_refused_for_good_is_out_with_the_reason(code, outcome, tmp_path, state):
    state.refused(member("nano"), code, "  the\nreason ")
    assert session(tmp_path) == (outcome, "the reason")
    state.gone(member("nano"), "it left")
    assert session(tmp_path) == (outcome, "the reason")
    assert session(tmp_path, "orin") == ("active", None)


def test_a_refusal_that_ends_nothing_leaves_all_as_it_was(tmp_path, state):
    opened(state, 1)
    state.refused(member("nano"), "bad_request", "no such piece")
    assert session(tmp_path) == ("active", None)
    assert outcomes(tmp_path)["nano"] == ("in round", None)


def test_a_second_agent_with_an_id_in_use_is_on_record_and_the_first_stays(tmp_path, state):
    state.turned_away(NANO, SessionId("bbbbbbbb-1"), "another agent is connected as 'nano'")
    assert session(tmp_path) == ("active", None)
    found = rows(tmp_path, "SELECT session, outcome FROM sessions WHERE device = 'nano'")
    assert found == [("aaaaaaaa-1", "active"), ("bbbbbbbb-1", "refused")]


def test_a_device_that_comes_back_is_another_session_of_it(tmp_path, state, clock):
    state.gone(member("nano"), "x" * 10_000)
    assert len(session(tmp_path)[1]) == LONGEST_REASON
    clock.advance(60)
    state.joined(member("nano", session="bbbbbbbb-1"))
    state.joined(member("nano", session="bbbbbbbb-1"))
    columns = "session, sessions, first_seen_at < last_seen_at, outcome"
    found = rows(tmp_path, f"SELECT {columns} FROM devices WHERE device = 'nano'")
    assert found == [("bbbbbbbb-1", 2, 1, "active")]


def test_when_a_device_was_last_seen_follows_what_it_does(tmp_path, state, clock):
    opened(state, 1)
    clock.advance(60)
    state.delivered(NANO)
    seen = dict(rows(tmp_path, "SELECT device, last_seen_at FROM devices"))
    assert seen == {
        "nano": "1970-01-01T00:01:00.000+00:00",
        "orin": "1970-01-01T00:00:00.000+00:00",
    }


def test_what_a_device_says_and_measured_of_itself_is_there_as_json(tmp_path, state):
    point = BlockPoint(
        blocks=1,
        adapter_parameters=1,
        sequences=1,
        length=1,
        forward_s=1.0,
        backward_s=1.0,
        peak_bytes=1,
    )
    measured = measurements(runtime_bytes=12345, blocks=(point,) * 3)
    opened_by = member("nano", measurements=measured)
    state.round_opened(opened(state, 1, devices=["nano"]), start_of(opened_by))
    ((profile, found),) = rows(
        tmp_path, "SELECT profile, measured FROM devices WHERE device = 'nano'"
    )
    assert json.loads(profile)["machine"] == "board"
    assert json.loads(found)["runtime_bytes"] == 12345


# --- how it ends --------------------------------------------------------------------------------


def test_a_run_that_is_complete_says_so_and_its_devices_are_done(tmp_path, clock):
    with RunState(tmp_path, clock, resumed_round=None) as state:
        state.joined(member("nano"))
        state.joined(member("orin", stage=Stage.DONE))
        state.gone(member("orin", stage=Stage.DONE), "it left")
    assert rows(tmp_path, "SELECT ending, ended_at IS NULL FROM starts") == [("complete", 0)]
    assert session(tmp_path) == ("done", "complete")
    assert session(tmp_path, "orin") == ("done", "it left")


def test_why_it_stopped_is_on_record_and_that_it_was_killed(tmp_path, clock):
    with contextlib.suppress(QuorumError), RunState(tmp_path, clock, resumed_round=None) as state:
        state.joined(member("nano"))
        raise QuorumError("too few devices")
    assert session(tmp_path) == ("lost", "too few devices")
    with contextlib.suppress(KeyboardInterrupt), RunState(tmp_path, clock, resumed_round=0):
        raise KeyboardInterrupt
    killed = RunState(tmp_path, clock, resumed_round=3)
    killed.joined(member("nano"))
    killed._db.close()
    with RunState(tmp_path, clock, resumed_round=4):
        pass
    found = rows(tmp_path, "SELECT resumed_round, ending FROM starts")
    assert found == [
        (None, "too few devices"),
        (0, "stopped (KeyboardInterrupt)"),
        (3, "it was killed"),
        (4, "complete"),
    ]
    assert session(tmp_path) == ("lost", "the coordinator was started again")


# --- law 6, in the schema -----------------------------------------------------------------------


def write(state, statement):
    with database.transaction(state._db, state._path):
        state._db.execute(statement)


@pytest.mark.parametrize(
    ("what", "statement"),
    [
        ("a contribution", "INSERT INTO contributions VALUES (1, 1, 0, 'nano', 7, 2)"),
        ("a step", "INSERT INTO steps VALUES (1, 1, 0, '', 1)"),
        (
            "a delivery",
            "INSERT INTO participants SELECT * FROM participants WHERE device = 'nano'",
        ),
        (
            "a round",
            (
                "INSERT INTO rounds SELECT round, 2, start, state, 90, 92, server_ranks, "
                "opened_at, NULL, NULL, NULL FROM rounds"
            ),
        ),
    ],
)
def test_nothing_can_be_there_twice(what, statement, tmp_path, state):
    opened(state, 1)
    trained(state, 0, BOTH)
    with pytest.raises(StorageError, match="UNIQUE constraint failed"):
        write(state, statement)
    assert rows(tmp_path, "SELECT count(*) FROM contributions") == [(2,)]


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("INSERT INTO steps VALUES (1, 1, 2, '', 1)", "a step belongs to an open round"),
        ("INSERT INTO contributions VALUES (1, 1, 1, 'nano', 7, 2)", "FOREIGN KEY"),
        ("INSERT INTO contributions VALUES (1, 1, 0, 'pi', 7, 2)", "FOREIGN KEY"),
        (
            (
                "INSERT INTO rounds SELECT 2, 1, start, state, 1, 3, server_ranks, opened_at, "
                "NULL, NULL, NULL FROM rounds"
            ),
            "a step belongs to one round",
        ),
    ],
)
def test_a_step_is_of_one_open_round_and_of_its_participants(statement, match, tmp_path, state):
    opened(state, 1)
    trained(state, 0, BOTH)
    with pytest.raises(StorageError, match=match):
        write(state, statement)


def test_a_step_cannot_close_twice_nor_after_its_round(tmp_path, state):
    opened(state, 1)
    trained(state, 0, BOTH)
    with pytest.raises(StorageError, match="UNIQUE"):
        trained(state, 0, BOTH)
    close(state, [NANO], {NANO: 7})
    with pytest.raises(StorageError, match="a step belongs to an open round"):
        trained(state, 1, BOTH)
    assert rows(tmp_path, "SELECT step FROM steps") == [(0,)]
