"""One round, event by event; any order of events is in tests/property/test_rounds.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.rounds import (
    Allowance,
    CloseEvaluation,
    CloseRound,
    CloseStep,
    Delivered,
    Evaluated,
    LeaveOut,
    Lost,
    MicroBatchDone,
    Round,
    Tick,
)
from shared.errors import ProtocolError
from shared.protocol.messages import DeviceId

NANO, ORIN, PI = DeviceId("nano"), DeviceId("orin"), DeviceId("pi")


def new_round(*, exchanging=(NANO, ORIN), alone=(), steps=2, evaluated=True):
    round_ = Round(1, first_step=10, steps=steps, exchanging=exchanging, alone=alone)
    if evaluated:
        for device in sorted(round_.participants):
            round_.handle(Evaluated(device))
    return round_


def done(device, step=10, index=0, *, of=1, tokens=5):
    return MicroBatchDone(device, step, index, of, tokens)


def train(round_, *devices):
    """Hand in one micro-batch of every device for each step that is open."""
    while round_.training:
        for device in devices:
            round_.handle(done(device, round_.step))


def test_a_round_evaluates_then_steps_then_takes_results():
    round_ = new_round(evaluated=False)
    assert round_.handle(Evaluated(ORIN)) == ()
    assert round_.waiting_for == {NANO}
    assert round_.handle(Evaluated(NANO)) == (CloseEvaluation((NANO, ORIN)),)
    for step in (10, 11):
        assert round_.handle(done(ORIN, step)) == ()
        assert round_.handle(done(NANO, step)) == (CloseStep(step, (NANO, ORIN), 10),)
    assert round_.handle(Delivered(ORIN, 10)) == ()
    assert round_.waiting_for == {NANO}
    assert round_.handle(Delivered(NANO, 10)) == (CloseRound((NANO, ORIN)),)
    assert round_.target_tokens == {NANO: 10, ORIN: 10}
    assert round_.waiting_for == frozenset()


def test_a_step_closes_only_with_all_micro_batches_of_all():
    round_ = new_round()
    round_.handle(done(NANO))
    assert round_.handle(done(ORIN, index=2, of=3, tokens=1)) == ()
    assert round_.handle(done(ORIN, index=0, of=3, tokens=2)) == ()
    assert round_.waiting_for == {ORIN}
    assert round_.handle(done(ORIN, index=1, of=3, tokens=4)) == (CloseStep(10, (NANO, ORIN), 12),)


def test_each_step_may_have_another_number_of_micro_batches():
    round_ = new_round(exchanging=(NANO,))
    assert round_.handle(done(NANO)) == (CloseStep(10, (NANO,), 5),)
    assert round_.handle(done(NANO, 11, of=2)) == ()
    assert round_.handle(done(NANO, 11, 1, of=2)) == (CloseStep(11, (NANO,), 10),)


def test_a_device_lost_mid_step_takes_its_share_of_that_step_along():
    round_ = new_round()
    round_.handle(done(NANO))
    round_.handle(done(ORIN, index=0, of=2))
    assert round_.handle(Lost(ORIN)) == (CloseStep(10, (NANO,), 5),)
    assert round_.participants == {NANO}


def test_what_a_lost_device_did_in_closed_steps_stays():
    round_ = new_round()
    round_.handle(done(NANO))
    round_.handle(done(ORIN, tokens=7))
    round_.handle(Lost(ORIN))
    assert round_.target_tokens == {NANO: 5, ORIN: 7}


def test_a_device_lost_after_it_delivered_changes_nothing():
    round_ = new_round()
    train(round_, NANO, ORIN)
    round_.handle(Delivered(ORIN, 0))
    assert round_.handle(Lost(ORIN)) == ()
    assert round_.handle(Delivered(NANO, 0)) == (CloseRound((NANO, ORIN)),)


def test_a_device_may_deliver_while_others_are_at_the_last_step():
    round_ = new_round(steps=1)
    round_.handle(done(NANO))
    assert round_.handle(Delivered(NANO, 5)) == ()
    assert round_.handle(Lost(NANO)) == (), "it has done all that was asked of it"
    assert round_.handle(done(ORIN)) == (CloseStep(10, (NANO, ORIN), 10),)


def test_losing_everybody_closes_the_round_with_nothing():
    round_ = new_round(evaluated=False)
    assert round_.handle(Lost(NANO)) == ()
    assert round_.handle(Lost(ORIN)) == (CloseEvaluation(()), CloseRound(()))


def test_losing_a_stranger_or_the_same_one_again_changes_nothing():
    round_ = new_round()
    assert round_.handle(Lost(PI)) == ()
    round_.handle(Lost(ORIN))
    assert round_.handle(Lost(ORIN)) == ()
    assert round_.waiting_for == {NANO}


def test_one_that_trains_alone_is_waited_for_only_at_the_end_and_counts_its_own_tokens():
    round_ = new_round(exchanging=(NANO,), alone=(PI,))
    assert round_.waiting_for == {NANO}
    assert round_.handle(Delivered(PI, 300)) == ()
    train(round_, NANO)
    assert round_.handle(Delivered(NANO, 999)) == (CloseRound((NANO, PI)),)
    assert round_.target_tokens == {NANO: 10, PI: 300}, "an exchanging device's own word is not"


def test_when_all_that_exchange_are_lost_the_others_go_on():
    round_ = new_round(exchanging=(NANO,), alone=(PI,))
    assert round_.handle(Lost(NANO)) == ()
    assert round_.waiting_for == {PI}
    assert round_.handle(Delivered(PI, 1)) == (CloseRound((PI,)),)


def test_a_round_without_steps_ends_with_the_evaluation():
    round_ = new_round(steps=0, evaluated=False)
    round_.handle(Evaluated(NANO))
    assert round_.handle(Evaluated(ORIN)) == (CloseEvaluation((NANO, ORIN)), CloseRound(()))


def test_a_repeated_evaluation_or_delivery_is_passed_over():
    round_ = new_round(evaluated=False)
    round_.handle(Evaluated(NANO))
    assert round_.handle(Evaluated(NANO)) == ()
    assert round_.handle(Evaluated(ORIN)) == (CloseEvaluation((NANO, ORIN)),)
    train(round_, NANO, ORIN)
    round_.handle(Delivered(NANO, 1))
    assert round_.handle(Delivered(NANO, 1)) == ()
    assert round_.delivered == {NANO}


REFUSED = [
    (done(PI), "pi is not part of round 1"),
    (Evaluated(PI), "pi is not part"),
    (done(NANO, 9), "step 9 of round 1 is not open"),
    (done(NANO, 11), "step 11 of round 1 is not open"),
    (done(NANO, index=1, of=1), "micro-batch 1 of 1"),
    (done(ORIN, index=0, of=2), "came twice"),
    (done(ORIN, index=1, of=3), "3 micro-batches, 2 before"),
    (Delivered(NANO, 0), "delivered while step 10 waits for it"),
]


@pytest.mark.parametrize(("event", "says"), REFUSED)
def test_what_is_not_due_is_refused_and_changes_nothing(event, says):
    round_ = new_round()
    round_.handle(done(ORIN, index=0, of=2))
    with pytest.raises(ProtocolError, match=says):
        round_.handle(event)
    round_.handle(done(NANO))
    assert round_.handle(done(ORIN, index=1, of=2)) == (CloseStep(10, (NANO, ORIN), 15),)


def test_adapters_before_the_evaluation_are_refused_so_that_nobody_waits_for_its_loss():
    round_ = new_round(exchanging=(), alone=(PI,), evaluated=False)
    with pytest.raises(ProtocolError, match="before it evaluated"):
        round_.handle(Delivered(PI, 5))
    assert round_.handle(Lost(PI)) == (CloseEvaluation(()), CloseRound(()))


def test_a_closed_round_takes_no_notice():
    round_ = new_round(steps=0)
    assert round_.closed
    assert round_.handle(Lost(NANO)) == ()
    assert round_.handle(done(PI)) == ()


# --- patience -----------------------------------------------------------------------------------

PATIENCE = Allowance(quiet_s=10.0, evaluate_s=50.0, first_step_s=40.0, step_s=20.0, alone_s=70.0)


def patient_round(*, exchanging=(NANO, ORIN), alone=(), steps=3, evaluated=True, patience=PATIENCE):
    allowances = dict.fromkeys((*exchanging, *alone), patience)
    round_ = Round(
        1, first_step=10, steps=steps, exchanging=exchanging, alone=alone, allowances=allowances
    )
    if evaluated:
        for device in sorted(round_.participants):
            round_.handle(Evaluated(device))
    return round_


def ticks(round_, seconds, **kinds):
    """Let whole seconds pass; return what the round says meanwhile."""
    kinds = {kind: frozenset(devices) for kind, devices in kinds.items()}
    said = []
    for _ in range(seconds):
        said += round_.handle(Tick(1.0, **kinds))
    return said


def test_one_that_asks_nothing_is_left_out_and_the_step_closes_without_it():
    round_ = patient_round()
    round_.handle(done(ORIN))
    assert ticks(round_, 10) == []
    assert ticks(round_, 1) == [LeaveOut(NANO, 11.0), CloseStep(10, (ORIN,), 5)]
    with pytest.raises(ProtocolError, match="not part of round 1"):
        round_.handle(done(NANO))


def test_one_that_keeps_asking_has_as_long_as_its_step_may_take():
    round_ = patient_round()
    round_.handle(done(ORIN))
    assert ticks(round_, 40, active={NANO}) == []
    assert LeaveOut(NANO, 41.0) in ticks(round_, 1, active={NANO})


def test_each_step_is_timed_by_itself_and_the_first_may_be_longer():
    round_ = patient_round(exchanging=(NANO,))
    ticks(round_, 40, active={NANO})
    round_.handle(done(NANO, 10))
    assert ticks(round_, 20, active={NANO}) == []
    round_.handle(done(NANO, 11))
    assert ticks(round_, 20, active={NANO}) == []
    assert ticks(round_, 1, active={NANO}) == [LeaveOut(NANO, 21.0), CloseRound(())]


def test_who_did_its_part_of_the_step_is_not_timed():
    round_ = patient_round()
    round_.handle(done(ORIN))
    assert [i.device for i in ticks(round_, 11) if isinstance(i, LeaveOut)] == [NANO]
    assert round_.participants == {ORIN}
    assert round_.step == 11


def test_what_the_server_has_to_do_is_not_the_devices_time():
    round_ = patient_round()
    assert ticks(round_, 1000, served={NANO, ORIN}) == []
    assert ticks(round_, 10) == []


def test_an_evaluation_is_timed_too():
    round_ = patient_round(evaluated=False)
    round_.handle(Evaluated(ORIN))
    assert ticks(round_, 50, active={NANO}) == []
    said = ticks(round_, 1, active={NANO})
    assert said == [LeaveOut(NANO, 51.0), CloseEvaluation((ORIN,))]


def test_one_that_trains_and_never_evaluates_gains_no_time_by_its_steps():
    round_ = patient_round(exchanging=(NANO,), evaluated=False)
    assert ticks(round_, 40, active={NANO}) == []
    assert round_.handle(done(NANO, 10)) == (CloseStep(10, (NANO,), 5),)
    assert ticks(round_, 10, active={NANO}) == []
    said = ticks(round_, 1, active={NANO})
    assert said == [LeaveOut(NANO, 51.0), CloseEvaluation(()), CloseRound(())]


def test_adapters_that_never_come_are_not_waited_for():
    round_ = patient_round(steps=1)
    train(round_, NANO, ORIN)
    round_.handle(Delivered(ORIN, 5))
    assert ticks(round_, 11) == [LeaveOut(NANO, 11.0), CloseRound((ORIN,))]
    assert round_.target_tokens == {NANO: 5, ORIN: 5}, "its closed steps stay"


def test_adapters_on_their_way_over_a_slow_link_have_the_time_that_they_need():
    patient = replace(PATIENCE, hand_in_s=30.0)
    round_ = patient_round(exchanging=(NANO,), steps=1, patience=patient)
    assert ticks(round_, 40, active={NANO}) == []
    train(round_, NANO)
    assert ticks(round_, 50, active={NANO}) == []
    assert ticks(round_, 1, active={NANO}) == [LeaveOut(NANO, 51.0), CloseRound(())]


def test_one_that_trains_alone_is_quiet_by_nature_but_not_for_ever():
    round_ = patient_round(exchanging=(NANO,), alone=(PI,), steps=1)
    ticks(round_, 9)
    train(round_, NANO)
    round_.handle(Delivered(NANO, 5))
    assert ticks(round_, 61) == []
    assert ticks(round_, 1) == [LeaveOut(PI, 71.0), CloseRound((NANO,))]


def test_one_that_evaluates_alone_is_quiet_meanwhile_too():
    round_ = patient_round(exchanging=(NANO,), alone=(PI,), evaluated=False)
    round_.handle(Evaluated(NANO))
    assert ticks(round_, 50) == []
    assert ticks(round_, 1) == [LeaveOut(PI, 51.0), CloseEvaluation((NANO,))]


def test_several_may_be_late_at_once():
    round_ = patient_round()
    assert ticks(round_, 11) == [LeaveOut(NANO, 11.0), LeaveOut(ORIN, 11.0), CloseRound(())]
