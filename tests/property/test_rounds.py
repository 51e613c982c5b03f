"""Any order of events closes a round once, weights sum to one, nobody is waited for for ever."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation import Contribution, block_weights
from coordinator.rounds import (
    Allowance,
    CloseEvaluation,
    CloseRound,
    CloseStep,
    Delivered,
    Evaluated,
    Event,
    Instruction,
    LeaveOut,
    Lost,
    MicroBatchDone,
    Round,
    Tick,
)
from shared.errors import ProtocolError
from shared.protocol.messages import DeviceId

FIRST_STEP = 20
NAMES = [DeviceId(name) for name in ("ada", "bob", "cyd", "dan")]
BLOCKS = 4
ALLOWANCE = Allowance(quiet_s=20.0, evaluate_s=90.0, first_step_s=60.0, step_s=40.0, alone_s=150.0)
LONGEST_S = ALLOWANCE.evaluate_s + ALLOWANCE.first_step_s + 4 * ALLOWANCE.step_s + ALLOWANCE.alone_s
"""Of a round of four steps in which everybody just keeps the time."""


class Play:
    """A round, and its participants: each does what is its turn, or is lost."""

    def __init__(self, *, exchanging: int, alone: int, steps: int, of: dict[DeviceId, int]) -> None:
        self.exchanging = NAMES[:exchanging]
        self.alone = NAMES[exchanging : exchanging + alone]
        self.round = Round(
            3,
            first_step=FIRST_STEP,
            steps=steps,
            exchanging=self.exchanging,
            alone=self.alone,
            allowances=dict.fromkeys(NAMES, ALLOWANCE),
        )
        self.steps = steps
        self.of = of
        self.evaluated: set[DeviceId] = set()
        self.done: Counter[tuple[DeviceId, int]] = Counter()
        self.lost: set[DeviceId] = set()
        self.instructions: list[Instruction] = []

    @property
    def closes(self) -> list[CloseStep]:
        return [i for i in self.instructions if isinstance(i, CloseStep)]

    def tell(self, event: Event) -> None:
        for instruction in self.round.handle(event):
            self.instructions.append(instruction)
            if isinstance(instruction, CloseStep):
                self.check_step(instruction)
            elif isinstance(instruction, LeaveOut):
                assert instruction.device not in self.round.delivered
                self.lost.add(instruction.device)

    def check_step(self, close: CloseStep) -> None:
        assert close.step == FIRST_STEP + len(self.closes) - 1
        expected = [d for d in self.exchanging if d not in self.lost]
        assert list(close.devices) == expected
        for device in close.devices:
            assert self.done[device, close.step] == self.of[device], "not all micro-batches"
        assert close.target_tokens == sum(
            tokens(device, close.step, index)
            for device in close.devices
            for index in range(self.of[device])
        )

    def go_on(self, device: DeviceId) -> None:
        """Let one device do the next thing that a sound agent would do."""
        if device in self.lost or device in self.round.delivered or self.round.closed:
            return
        if device not in self.evaluated:
            self.evaluated.add(device)
            self.tell(Evaluated(device))
        elif device in self.exchanging and self.has_work(device):
            step, index = self.round.step, self.done[device, self.round.step]
            self.done[device, step] += 1
            event = MicroBatchDone(
                device, step, index, self.of[device], tokens(device, step, index)
            )
            self.tell(event)
        elif self.may_deliver(device):
            self.tell(Delivered(device, 1000))

    def has_work(self, device: DeviceId) -> bool:
        return self.round.training and self.done[device, self.round.step] < self.of[device]

    def may_deliver(self, device: DeviceId) -> bool:
        if self.steps == 0:
            return False
        return device in self.alone or self.round.step >= FIRST_STEP + self.steps - 1

    def lose(self, device: DeviceId) -> None:
        if device not in self.round.delivered:
            self.lost.add(device)
        self.tell(Lost(device))


def tokens(device: DeviceId, step: int, index: int) -> int:
    return 100 * NAMES.index(device) + 10 * (step % 7) + index


plays = st.builds(
    Play,
    exchanging=st.integers(0, 3),
    alone=st.integers(0, 1),
    steps=st.integers(0, 4),
    of=st.fixed_dictionaries({name: st.integers(1, 3) for name in NAMES}),
).filter(lambda play: play.round.participants)
moves = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 15)), max_size=120)
seconds = st.lists(st.floats(0.1, 30.0), min_size=1, max_size=20)


@settings(deadline=None, max_examples=300)
@given(play=plays, moves=moves)
def test_any_order_of_events_closes_a_round_exactly_once(play: Play, moves):
    everybody = play.round.participants
    for device, chance in moves:
        if chance == 1:
            play.tell(Tick(5.0, active=frozenset(NAMES) - {device}))
        elif device in everybody:
            play.lose(device) if chance == 0 else play.go_on(device)
        assert play.round.closed or play.round.waiting_for, "open, and waits for nobody"
    for _ in range(200):
        for device in play.round.waiting_for:
            play.go_on(device)
    assert play.round.closed, "what it waits for brings the round on"
    ends = [i for i in play.instructions if isinstance(i, CloseRound)]
    assert ends == play.instructions[-1:], "once, and last"
    delivered = {d for d in everybody if d not in play.lost} if play.steps else set()
    assert set(ends[0].delivered) == delivered
    assert sum(isinstance(i, CloseEvaluation) for i in play.instructions) == 1
    assert play.round.handle(Lost(NAMES[0])) == ()
    check_tokens(play, delivered)
    check_weights(play, delivered)


def check_tokens(play: Play, delivered: set[DeviceId]) -> None:
    expected: Counter[DeviceId] = Counter({d: 1000 for d in play.alone if d in delivered})
    for close in play.closes:
        for device in close.devices:
            batches = range(play.of[device])
            expected[device] += sum(tokens(device, close.step, i) for i in batches)
    assert Counter(play.round.target_tokens) == expected
    closed = [close.target_tokens for close in play.closes]
    assert sum(closed) == sum(expected[d] for d in play.exchanging)


@settings(deadline=None)
@given(play=plays, moves=moves)
def test_losing_whoever_is_waited_for_ends_the_round(play: Play, moves):
    for device, _ in moves[: len(moves) // 2]:
        if device in play.round.participants:
            play.go_on(device)
    for _ in range(len(NAMES) + 1):
        for device in sorted(play.round.waiting_for):
            play.lose(device)
    assert play.round.closed
    assert sum(isinstance(i, CloseRound) for i in play.instructions) == 1


@settings(deadline=None, max_examples=300)
@given(play=plays, moves=moves, seconds=seconds, whose=st.sets(st.sampled_from(NAMES)))
def test_time_alone_ends_a_round_whatever_the_devices_claim_to_do(
    play: Play, moves, seconds, whose
):
    """``whose``: those who ask something again and again, and never what the round waits for."""
    for device, _ in moves[: len(moves) // 2]:
        if device in play.round.participants:
            play.go_on(device)
    passed_s, turn = 0.0, 0
    while not play.round.closed:
        play.tell(Tick(seconds[turn % len(seconds)], active=frozenset(whose)))
        passed_s += seconds[turn % len(seconds)]
        turn += 1
        assert passed_s < LONGEST_S + max(seconds) * 7, "waited for longer than was allowed"
    assert sum(isinstance(i, CloseRound) for i in play.instructions) == 1
    check_weights(play, set(play.round.delivered))


@given(play=plays, moves=moves)
def test_nobody_is_late_while_the_server_has_its_requests_to_carry_out(play: Play, moves):
    for device, _ in moves:
        play.tell(Tick(1000.0, served=frozenset(NAMES)))
        if device in play.round.participants:
            play.go_on(device)
    assert not any(isinstance(one, LeaveOut) for one in play.instructions)


def check_weights(play: Play, delivered: set[DeviceId]) -> None:
    """Check that what the round is aggregated with sums to one in every block."""
    contributions = [
        Contribution(
            device=device,
            split_layer=BLOCKS if device in play.alone else 1 + NAMES.index(device),
            target_tokens=count,
            adapters={} if device in delivered else None,
        )
        for device, count in play.round.target_tokens.items()
        if device in delivered or device not in play.alone
    ]
    for block in range(BLOCKS):
        weights = block_weights(contributions, block)
        trained = [one for one in contributions if one.target_tokens]
        in_it = [one for one in trained if one.adapters is not None or one.split_layer <= block]
        assert sum(weights.values()) == pytest.approx(1.0 if in_it else 0.0)
        assert all(0.0 <= weight <= 1.0 for weight in weights.values())


events = st.one_of(
    st.builds(Evaluated, st.sampled_from(NAMES)),
    st.builds(
        MicroBatchDone,
        st.sampled_from(NAMES),
        st.integers(FIRST_STEP - 1, FIRST_STEP + 3),
        st.integers(0, 3),
        st.integers(1, 3),
        st.integers(0, 50),
    ),
    st.builds(Delivered, st.sampled_from(NAMES), st.integers(0, 50)),
    st.builds(Lost, st.sampled_from(NAMES)),
    st.builds(Tick, st.floats(0, 200), st.frozensets(st.sampled_from(NAMES))),
)


@settings(deadline=None, max_examples=300)
@given(
    exchanging=st.integers(0, 3),
    alone=st.integers(0, 1),
    steps=st.integers(0, 3),
    sent=st.lists(events, max_size=80),
)
def test_events_that_nobody_should_send_are_refused_and_end_nothing_twice(
    exchanging, alone, steps, sent
):
    round_ = Round(
        1,
        first_step=FIRST_STEP,
        steps=steps,
        exchanging=NAMES[:exchanging],
        alone=NAMES[exchanging : exchanging + alone],
    )
    out: list[Instruction] = []
    for event in sent:
        try:
            out += round_.handle(event)
        except ProtocolError:
            continue
    for name in NAMES:
        out += round_.handle(Lost(name))
    for name in NAMES:  # all that is left to wait for now are those who delivered
        assert name not in round_.waiting_for
    kinds = Counter(type(i) for i in out)
    assert kinds[CloseRound] == 1
    assert kinds[CloseEvaluation] == 1
    assert kinds[CloseStep] <= steps
    steps_closed = [i.step for i in out if isinstance(i, CloseStep)]
    assert steps_closed == list(range(FIRST_STEP, FIRST_STEP + len(steps_closed)))
