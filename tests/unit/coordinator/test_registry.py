"""Who is a member: one start of each device, the living one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.registry import RECONNECT_S, WILL_GRACE_S, Admitted, Held, Known, Registry
from shared.protocol.messages import (
    Accepted,
    Call,
    DeviceId,
    DeviceProfile,
    JoinRequest,
    SessionId,
)
from shared.protocol.topics import device_topic

NANO, ORIN = DeviceId("nano"), DeviceId("orin")
COMMANDS = device_topic(NANO, "commands")
LOST_AFTER_S = 6.0
PROFILE = DeviceProfile(backend="torch", hsplit_version="0", sequences=1, evaluation_sequences=0)


def session(instance: int, life: int = 0) -> SessionId:
    return SessionId(f"{instance:08x}{life:08x}")


FIRST, SECOND = session(1), session(2)


def request(of: SessionId) -> JoinRequest:
    return JoinRequest(call=Call(session=of, number=0), profile=PROFILE)


def registry(*joined: SessionId, now_s: float = 0.0) -> Registry:
    made = Registry(lost_after_s=LOST_AFTER_S)
    for one in joined:
        assert isinstance(made.join(NANO, request(one), now_s), Admitted)
    return made


def test_a_new_device_is_admitted_and_found_by_device_and_session():
    made = registry(FIRST)
    member = made.find(NANO, FIRST)
    assert member is not None
    assert (member.heard_s, member.asked_s) == (0.0, 0.0)
    assert made.find(NANO, SECOND) is None
    assert made.find(ORIN, FIRST) is None


def test_members_stand_in_the_order_of_their_names():
    made = Registry(lost_after_s=LOST_AFTER_S)
    made.join(ORIN, request(FIRST), 0.0)
    made.join(NANO, request(FIRST), 0.0)
    assert [member.device_id for member in made] == [NANO, ORIN]
    assert len(made) == 2


def test_a_repeated_request_is_known():
    made = registry(FIRST)
    again = made.join(NANO, request(FIRST), 1.0)
    assert again == Known(made.find(NANO, FIRST))
    assert len(made) == 1


def test_a_later_life_of_the_same_start_takes_its_own_place():
    made = registry(FIRST)
    old = made.find(NANO, FIRST)
    result = made.join(NANO, request(session(1, 1)), 1.0)
    assert isinstance(result, Admitted)
    assert result.replaced is old
    assert made.find(NANO, FIRST) is None


def test_a_late_request_of_an_earlier_life_replaces_nobody():
    made = registry(session(1, 1))
    assert made.join(NANO, request(FIRST), 1.0) == Known(made.find(NANO, session(1, 1)))
    assert made.find(NANO, session(1, 1)) is not None


def test_a_second_start_is_refused_when_the_first_speaks():
    made = registry(FIRST)
    second = request(SECOND)
    assert made.join(NANO, second, 1.0) == Held()
    assert made.is_held(NANO, SECOND)
    assert made.heard(NANO, FIRST, 2.0) == second
    assert not made.is_held(NANO, SECOND)
    assert made.heard(NANO, FIRST, 3.0) is None, "refused once"


def test_what_the_first_said_before_does_not_refuse_the_second():
    made = registry(FIRST)
    made.join(NANO, request(SECOND), 1.0)
    assert made.heard(NANO, FIRST, 1.0) is None
    assert made.is_held(NANO, SECOND)


def test_asking_again_does_not_make_a_challenger_look_younger():
    made = registry(FIRST)
    made.join(NANO, request(SECOND), 1.0)
    made.join(NANO, request(SECOND), 2.0)
    assert made.heard(NANO, FIRST, 1.5) is not None


def test_a_challengers_own_words_do_not_decide():
    made = registry(FIRST)
    made.join(NANO, request(SECOND), 1.0)
    assert made.heard(NANO, SECOND, 5.0) is None
    assert [m.session for m in made.lost(LOST_AFTER_S)] == [FIRST]


def test_a_second_start_is_admitted_when_the_first_stays_silent():
    made = registry(FIRST)
    second = request(SECOND)
    made.join(NANO, second, 1.0)
    assert made.admit_challengers(5.9) == []
    (gone,) = made.lost(6.0)
    assert gone.session == FIRST
    ((member, answered),) = made.admit_challengers(6.0)
    assert (member.session, member.heard_s, answered) == (SECOND, 6.0, second)
    assert made.admit_challengers(6.0) == []


def test_a_death_notice_leaves_a_moment_for_the_link_to_mend():
    made = registry(FIRST)
    made.heard(NANO, FIRST, 10.0)
    made.offline(NANO, FIRST[:8], 10.0)
    assert made.lost(10.0 + WILL_GRACE_S - 0.1) == []
    made.heard(NANO, FIRST, 11.0)
    assert made.lost(10.0 + WILL_GRACE_S) == [], "it is back"
    made.offline(NANO, FIRST[:8], 11.0)
    assert len(made.lost(11.0 + WILL_GRACE_S)) == 1


def test_a_death_notice_of_another_start_is_not_the_members():
    made = registry(FIRST)
    made.offline(NANO, SECOND[:8], 0.0)
    made.offline(ORIN, FIRST[:8], 0.0)
    assert made.lost(WILL_GRACE_S) == []


def test_a_death_notice_never_makes_the_dead_look_alive():
    made = registry(FIRST)
    made.offline(NANO, FIRST[:8], 5.5)
    assert len(made.lost(6.0)) == 1, "it was silent before its will came"


def test_a_member_that_was_replaced_is_not_struck_off_again():
    made = registry(FIRST)
    old = made.find(NANO, FIRST)
    made.join(NANO, request(session(1, 1)), 1.0)
    made.remove(old)
    assert made.find(NANO, session(1, 1)) is not None


def test_what_nobody_could_hear_is_told_again():
    made, call = registry(FIRST), Call(session=FIRST, number=0)
    member = made.find(NANO, FIRST)
    assert member is not None
    member.book.admit(call)
    answer = Accepted(call=call)
    member.book.answer(COMMANDS, answer, 9.0)
    made.excuse(10.0)
    assert member.book.repeat((0,), 10.0, after_s=5.0) == ([(COMMANDS, answer)], [])


def test_what_nobody_could_hear_is_held_against_nobody():
    made = registry(FIRST)
    made.excuse(100.0)
    assert made.lost(100.0 + RECONNECT_S + LOST_AFTER_S - 0.1) == []
    assert [(m.asked_s, m.changing_s) for m in made] == [(100.0, 100.0)]
    assert len(made.lost(100.0 + RECONNECT_S + LOST_AFTER_S)) == 1


acts = st.lists(
    st.tuples(
        st.sampled_from(["join", "heard", "offline"]), st.integers(1, 3), st.floats(0.01, 4.0)
    ),
    max_size=60,
)


@settings(deadline=None)
@given(acts)
def test_a_second_start_is_refused_only_if_the_first_lives(actions):
    made = Registry(lost_after_s=LOST_AFTER_S)
    now_s = 0.0
    asked_s: dict[SessionId, float] = {}
    for action, instance, later_s in actions:
        now_s += later_s
        for member in made.lost(now_s):
            assert now_s - member.heard_s >= LOST_AFTER_S
        for member, join in made.admit_challengers(now_s):
            assert member.session == join.call.session
        one = session(instance)
        if action == "join":
            before = next(iter(made), None)
            result = made.join(NANO, request(one), now_s)
            assert isinstance(result, Held) == (before is not None and before.session != one)
            asked_s.setdefault(one, now_s)
            if not made.is_held(NANO, one):
                asked_s.pop(one)
        elif action == "heard":
            refused = made.heard(NANO, one, now_s)
            if refused is not None:
                assert made.find(NANO, one) is not None, "the one that lives is the member"
                assert refused.call.session != one
                assert asked_s.pop(refused.call.session) < now_s, "it lived after the challenge"
        else:
            made.offline(NANO, one[:8], now_s)
        assert len(made) <= 1
