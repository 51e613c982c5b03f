"""Micro-batches at the server: whose turn it is, and what is refused without a trace."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.exchange import Done, Exchange, ExchangeLimits, Failed
from coordinator.membership import StaleRequestError
from coordinator.planning.device_plan import DevicePlan
from coordinator.registry import Member
from coordinator.rounds import CloseStep, Evaluated, MicroBatchDone, Round
from coordinator.server_training import ServerTrainer
from shared.errors import NumericsError, ProtocolError
from shared.protocol.messages import (
    ActivationGradients,
    Activations,
    Call,
    DeviceId,
    DeviceProfile,
    EvaluatedLoss,
    Hidden,
    HiddenGradients,
    SessionId,
)
from shared.protocol.tensors import pack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.tiny_models import VOCAB_SIZE, fresh_adapters, tiny_model

NANO, ORIN = DeviceId("nano"), DeviceId("orin")
LORA = LoraTerms(r=2, target_modules=("c_attn",))
LENGTHS = (3, 2)
PLAN = DevicePlan(split_layer=1, ranks={}, scalings={}, batch=4, micro_batch=2, in_flight=2)
FIRST_STEP, STEPS = 10, 3
PROBE_SEQUENCES = 6


def member(device: DeviceId) -> Member:
    profile = DeviceProfile(
        backend="torch", hsplit_version="0", sequences=1, evaluation_sequences=1
    )
    made = Member(device, SessionId("0" * 16), profile, 0.0, 0.0)
    made.plan = PLAN
    return made


def trainer(labels: str) -> ServerTrainer:
    model = tiny_model("gpt2")
    made = ServerTrainer(
        model.config,
        model.tensors,
        first_block=1,
        training=TrainingTerms(labels=labels, wire_dtype="float32", max_length=8),
        lora=LORA,
        optimizer=OptimizerTerms(),
        device="cpu",
    )
    made.set_adapters(fresh_adapters(model.architecture, LORA, blocks=range(1, 3)), fold=False)
    return made


class Server:
    """An exchange in front of a real trainer, and the round that it feeds."""

    def __init__(self, labels: str = "server", *, open_micro_batches: int = 16) -> None:
        self.labels = labels
        self.nano, self.orin = member(NANO), member(ORIN)
        self.round = Round(2, first_step=FIRST_STEP, steps=STEPS, exchanging=(NANO, ORIN))
        for device in (NANO, ORIN):
            self.round.handle(Evaluated(device))
        self.trainer = trainer(labels)
        self.exchange = Exchange(
            self.trainer,
            self.round,
            limits=ExchangeLimits(
                open_micro_batches=open_micro_batches,
                evaluate_batch=3,
                max_length=8,
                probe_sequences=PROBE_SEQUENCES,
            ),
        )
        self._calls = 0

    def call(self) -> Call:
        self._calls += 1
        return Call(session=SessionId("0" * 16), number=self._calls)

    def activations(self, step: int = FIRST_STEP, index: int = 0, of: int = 1, **changes):
        random = np.random.default_rng([step, index])
        words = random.integers(0, VOCAB_SIZE, sum(LENGTHS), dtype=np.int32)
        message = Activations(
            call=self.call(),
            purpose="train",
            round=2,
            step=step,
            micro_batch=index,
            micro_batches=of,
            target_tokens=5,
            lengths=LENGTHS,
            hidden=pack(random.standard_normal((sum(LENGTHS), 32)).astype(np.float32)),
            labels=pack(words) if self.labels == "server" else None,
        )
        return dataclasses.replace(message, **changes)

    def gradients(self, step: int = FIRST_STEP, index: int = 0, **changes):
        message = HiddenGradients(
            call=self.call(),
            round=2,
            step=step,
            micro_batch=index,
            loss_sum=3.5,
            gradient=pack(np.full((sum(LENGTHS), 32), 0.01, np.float32)),
        )
        return dataclasses.replace(message, **changes)

    def take(self, who: Member, job: Activations | HiddenGradients) -> Done | Failed | None:
        self.exchange.submit(who, job)
        return self.exchange.run_one()

    def finish(self, who: Member, step: int) -> tuple:
        """Carry out the one micro-batch of a device's step; tell the round."""
        done = self.take(who, self.activations(step))
        assert isinstance(done, Done)
        assert done.event is not None
        instructions = self.round.handle(done.event)
        for close in instructions:
            assert isinstance(close, CloseStep)
            self.trainer.close_step(
                close.step, devices=close.devices, target_tokens=close.target_tokens
            )
        return instructions


def test_with_labels_here_a_micro_batch_is_done_in_one_go():
    server = Server()
    job = server.activations(index=1, of=2)
    done = server.take(server.nano, job)
    assert isinstance(done, Done)
    assert isinstance(done.reply, ActivationGradients)
    assert done.reply.call == job.call
    assert done.event == MicroBatchDone(NANO, FIRST_STEP, 1, 2, 5)
    assert done.loss_sum == done.reply.loss_sum > 0


def test_with_labels_there_it_is_done_when_the_heads_gradient_is_in():
    server = Server("device")
    hidden = server.take(server.nano, server.activations(of=2))
    assert isinstance(hidden, Done)
    assert isinstance(hidden.reply, Hidden)
    assert hidden.event is None
    done = server.take(server.nano, server.gradients())
    assert isinstance(done, Done)
    assert isinstance(done.reply, ActivationGradients)
    assert done.event == MicroBatchDone(NANO, FIRST_STEP, 0, 2, 5)
    assert done.loss_sum == 3.5, "the device's own word of its loss"


@pytest.mark.parametrize(("labels", "reply"), [("server", EvaluatedLoss), ("device", Hidden)])
def test_an_evaluation_is_carried_out_at_any_time_and_is_no_part_of_a_step(labels, reply):
    server = Server(labels)
    job = server.activations(step=0, purpose="evaluate")
    done = server.take(server.nano, job)
    assert isinstance(done, Done)
    assert isinstance(done.reply, reply)
    assert done.event is None
    assert server.trainer.open_micro_batches == 0


def test_nothing_waits_where_nothing_was_submitted():
    assert Server().exchange.run_one() is None


@pytest.mark.parametrize("changes", [{"round": 1}, {"round": 3}])
def test_what_belongs_to_another_round_is_stale(changes):
    server = Server()
    with pytest.raises(StaleRequestError, match="goes on without nano"):
        server.exchange.submit(server.nano, server.activations(**changes))


def test_who_takes_no_part_is_stale():
    server = Server()
    with pytest.raises(StaleRequestError, match="goes on without pi"):
        server.exchange.submit(member(DeviceId("pi")), server.activations())


def test_a_micro_batch_of_a_closed_step_is_stale():
    server = Server()
    server.finish(server.nano, FIRST_STEP)
    assert server.finish(server.orin, FIRST_STEP) != ()
    with pytest.raises(StaleRequestError, match="step 10 was closed without"):
        server.exchange.submit(server.orin, server.activations())


def test_a_device_one_step_ahead_waits_for_the_slowest():
    server = Server()
    server.finish(server.nano, FIRST_STEP)
    server.exchange.submit(server.nano, server.activations(FIRST_STEP + 1))
    assert server.exchange.run_one() is None
    server.exchange.submit(server.orin, server.activations())
    slow = server.exchange.run_one()
    assert isinstance(slow, Done)
    assert slow.member is server.orin
    (close,) = server.round.handle(slow.event)
    server.trainer.close_step(close.step, devices=close.devices, target_tokens=10)
    ahead = server.exchange.run_one()
    assert isinstance(ahead, Done)
    assert ahead.event == MicroBatchDone(NANO, FIRST_STEP + 1, 0, 1, 5)


@pytest.mark.parametrize("step", [FIRST_STEP + 2, FIRST_STEP + STEPS, 2**40])
def test_further_ahead_or_beyond_the_round_makes_no_sense(step):
    server = Server()
    with pytest.raises(ProtocolError, match=f"step {step} while step 10 is open"):
        server.exchange.submit(server.nano, server.activations(step))


NINE = pack(np.zeros((9, 32), np.float32))
UNPLANNED = [
    ({"of": 5}, ProtocolError, "micro-batch 0 of 5"),
    ({"index": 2, "of": 2}, ProtocolError, "micro-batch 2 of 2"),
    (
        {"lengths": (1, 1, 3)},
        ProtocolError,
        "nano, step 10, micro-batch 0: 3 sequences of up to 3 tokens, .* most 2 of 8",
    ),
    (
        {"lengths": (9,), "hidden": NINE},
        ProtocolError,
        "nano, step 10, micro-batch 0: 1 sequences of up to 9 tokens",
    ),
    (
        {"lengths": (1,) * 4, "purpose": "evaluate"},
        ProtocolError,
        "^evaluation of nano: 4 sequences .* most 3 of 8",
    ),
    (
        {"hidden": NINE},
        NumericsError,
        r"nano, step 10, micro-batch 0: \(9,\) activations and 5 targets for 5 tokens",
    ),
    ({"target_tokens": 6}, NumericsError, "6 targets for 5 tokens"),
    ({"target_tokens": 4}, NumericsError, "4 targets stated, 5 labels sent"),
]


@pytest.mark.parametrize(("changes", "error", "says"), UNPLANNED)
def test_what_was_not_planned_is_refused_before_it_is_queued(changes, error, says):
    server = Server()
    with pytest.raises(error, match=says):
        server.exchange.submit(server.nano, server.activations(**changes))
    assert server.exchange.run_one() is None


@pytest.mark.parametrize("labels", ["server", "device"])
@pytest.mark.parametrize("carried_out", [True, False])
def test_no_micro_batch_counts_twice_whatever_calls_it_comes_under(labels, carried_out):
    server = Server(labels)
    server.exchange.submit(server.nano, server.activations(of=2))
    if carried_out:
        server.exchange.run_one()
    with pytest.raises(ProtocolError, match="micro-batch 0 of step 10 came twice"):
        server.exchange.submit(server.nano, server.activations(of=2))
    server.exchange.submit(server.orin, server.activations(of=2))


def test_a_step_does_not_change_its_number_of_micro_batches_on_the_way():
    server = Server("device")
    server.take(server.nano, server.activations(of=1))
    with pytest.raises(ProtocolError, match="has 2 micro-batches now, and had 1 before"):
        server.exchange.submit(server.nano, server.activations(index=1, of=2))
    server.exchange.submit(server.nano, server.activations(FIRST_STEP + 1, of=2))


def test_gradients_of_what_is_not_open_are_refused():
    server = Server("device")
    with pytest.raises(ProtocolError, match="not open: 0"):
        server.exchange.submit(server.nano, server.gradients())
    server.take(server.nano, server.activations())
    with pytest.raises(ProtocolError, match="not open: 1"):
        server.exchange.submit(server.nano, server.gradients(index=1))
    with pytest.raises(ProtocolError, match="not open: 0"):
        server.exchange.submit(server.orin, server.gradients())


def test_gradients_that_come_twice_count_once():
    server = Server("device")
    server.take(server.nano, server.activations())
    server.exchange.submit(server.nano, server.gradients())
    server.exchange.submit(server.nano, server.gradients())
    assert isinstance(server.exchange.run_one(), Done)
    again = server.exchange.run_one()
    assert isinstance(again, Failed)
    assert isinstance(again.error, ProtocolError)


def poisoned(shape):
    array = np.zeros(shape, np.float32)
    array[0, 1] = np.nan
    return pack(array)


def test_nan_is_refused_and_leaves_no_trace():
    server, untouched = Server(), Server()
    bad = server.activations(hidden=poisoned((5, 32)))
    failed = server.take(server.nano, bad)
    assert isinstance(failed, Failed)
    assert failed.job is bad
    assert isinstance(failed.error, NumericsError)
    for one in (server, untouched):  # the very same micro-batch may come again, and counts once
        one.finish(one.nano, FIRST_STEP)
        assert one.finish(one.orin, FIRST_STEP), "the step closed"
    for name, pair in server.trainer.adapters().items():
        expected = untouched.trainer.adapters()[name]
        np.testing.assert_array_equal(pair.a_RI, expected.a_RI)
        np.testing.assert_array_equal(pair.b_OR, expected.b_OR)


def test_nan_in_a_gradient_is_refused_and_the_micro_batch_stays_open():
    server = Server("device")
    server.take(server.nano, server.activations())
    failed = server.take(server.nano, server.gradients(gradient=poisoned((5, 32))))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, NumericsError)
    assert isinstance(server.take(server.nano, server.gradients()), Done)


def test_a_bad_evaluation_does_not_let_a_training_micro_batch_count_twice():
    server = Server()
    server.take(server.nano, server.activations(of=2))
    bad = server.activations(purpose="evaluate", hidden=poisoned((5, 32)))
    assert isinstance(server.take(server.nano, bad), Failed)
    with pytest.raises(ProtocolError, match="came twice"):
        server.exchange.submit(server.nano, server.activations(of=2))


def test_what_a_lost_device_had_waiting_or_open_is_gone():
    server = Server("device")
    server.take(server.nano, server.activations(of=2))
    server.exchange.submit(server.nano, server.activations(index=1, of=2))
    server.exchange.submit(server.orin, server.activations())
    server.exchange.drop(NANO)
    assert server.trainer.open_micro_batches == 0
    left = server.exchange.run_one()
    assert isinstance(left, Done)
    assert left.member is server.orin
    assert server.exchange.run_one() is None
    with pytest.raises(ProtocolError, match="not open"):
        server.exchange.submit(server.nano, server.gradients())


def test_open_micro_batches_are_bounded_and_gradients_make_room():
    server = Server("device", open_micro_batches=1)
    server.take(server.nano, server.activations(of=2))
    server.exchange.submit(server.orin, server.activations())
    assert server.exchange.run_one() is None
    server.exchange.submit(server.nano, server.gradients())
    first, second = server.exchange.run_one(), server.exchange.run_one()
    assert isinstance(first, Done)
    assert isinstance(second, Done)
    assert (first.member, second.member) == (server.nano, server.orin)


def test_what_sets_memory_free_comes_before_what_takes_more():
    server = Server("device")
    server.take(server.nano, server.activations(of=2))
    server.exchange.submit(server.orin, server.activations())
    server.exchange.submit(server.nano, server.gradients())
    first = server.exchange.run_one()
    assert isinstance(first, Done)
    assert isinstance(first.reply, ActivationGradients)


# --- probes -------------------------------------------------------------------------------------


def probe(server: Server, who: Member, index: int = 0, of: int = 2) -> list[Done]:
    """Carry out one probe micro-batch of a member from end to end."""
    done = [server.take(who, server.activations(index=index, of=of, purpose="probe"))]
    if server.labels == "device":
        done.append(server.take(who, server.gradients(index=index, purpose="probe")))
    assert all(isinstance(one, Done) for one in done)
    return done


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_probe_is_answered_as_training_is_and_the_round_hears_nothing(labels):
    server = Server(labels)
    done = probe(server, server.nano)
    assert isinstance(done[-1].reply, ActivationGradients)
    assert [one.event for one in done] == [None] * len(done)
    measured = server.trainer.probe.take()
    assert measured.keys() == server.trainer.adapters().keys()
    assert {one.target_tokens for one in measured.values()} == {5}
    assert all(one.magnitude > 0 for one in measured.values())


@pytest.mark.parametrize("labels", ["server", "device"])
def test_training_after_a_probe_is_as_if_there_had_been_none(labels):
    probed, plain = Server(labels), Server(labels)
    for index in range(2):
        probe(probed, probed.nano, index)
    for server in (probed, plain):
        for who in (server.nano, server.orin):
            done = server.take(who, server.activations())
            if labels == "device":
                done = server.take(who, server.gradients())
            closing = server.round.handle(done.event)
        assert closing, "the step closed"
        for close in closing:
            server.trainer.close_step(
                close.step, devices=close.devices, target_tokens=close.target_tokens
            )
    for name, pair in probed.trainer.adapters().items():
        np.testing.assert_array_equal(pair.b_OR, plain.trainer.adapters()[name].b_OR)


def test_who_trains_already_does_not_wait_for_who_still_probes():
    server = Server("device")
    server.take(server.orin, server.activations(purpose="probe"))
    assert isinstance(server.take(server.nano, server.activations()), Done)
    assert isinstance(server.take(server.nano, server.gradients()), Done)
    assert isinstance(server.take(server.orin, server.gradients(purpose="probe")), Done)


def test_open_probes_are_bounded_with_the_rest():
    server = Server("device", open_micro_batches=1)
    server.take(server.nano, server.activations(purpose="probe"))
    server.exchange.submit(server.orin, server.activations(purpose="probe"))
    assert server.exchange.run_one() is None
    server.exchange.submit(server.nano, server.gradients(purpose="probe"))
    assert [server.exchange.run_one().member for _ in range(2)] == [server.nano, server.orin]


UNASKED = [
    ({"step": FIRST_STEP + 1}, "it comes before the round's first training micro-batch"),
    ({"of": PROBE_SEQUENCES + 1}, "7 micro-batches to probe, where 6 sequences were asked for"),
    ({"index": 2, "of": 2}, "micro-batch 2 of 2"),
    ({"lengths": (1, 1, 3)}, "3 sequences of up to 3 tokens, .* most 2 of 8"),
]


@pytest.mark.parametrize(("changes", "says"), UNASKED)
def test_a_probe_that_was_not_asked_for_is_refused(changes, says):
    server = Server()
    with pytest.raises(ProtocolError, match=says):
        server.exchange.submit(server.nano, server.activations(purpose="probe", **changes))
    assert server.exchange.run_one() is None


def test_no_probe_comes_once_training_began():
    server = Server()
    server.exchange.submit(server.nano, server.activations(of=2))
    with pytest.raises(ProtocolError, match="before the round's first training micro-batch"):
        server.exchange.submit(server.nano, server.activations(purpose="probe"))
    server.exchange.submit(server.orin, server.activations(purpose="probe"))


@pytest.mark.parametrize("carried_out", [True, False])
def test_no_training_begins_while_a_probe_is_open(carried_out):
    server = Server("device")
    server.exchange.submit(server.nano, server.activations(purpose="probe"))
    if carried_out:
        server.exchange.run_one()
    with pytest.raises(ProtocolError, match="begins while probe micro-batches are open"):
        server.exchange.submit(server.nano, server.activations())
    server.exchange.submit(server.orin, server.activations())


def test_a_probe_micro_batch_counts_once():
    server = Server()
    probe(server, server.nano)
    with pytest.raises(ProtocolError, match="micro-batch 0 of step 10 came twice"):
        server.exchange.submit(server.nano, server.activations(of=2, purpose="probe"))


def test_gradients_of_a_probe_are_not_those_of_a_step():
    server = Server("device")
    server.take(server.nano, server.activations(purpose="probe"))
    with pytest.raises(ProtocolError, match="not open"):
        server.exchange.submit(server.nano, server.gradients())


def test_nan_in_a_probe_is_refused_and_measures_nothing():
    server = Server()
    bad = server.activations(purpose="probe", hidden=poisoned((5, 32)))
    failed = server.take(server.nano, bad)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, NumericsError)
    assert server.trainer.probe.take() == {}
    probe(server, server.nano, of=1)  # the very same micro-batch may come again


def test_what_a_lost_device_had_open_of_a_probe_is_gone_and_what_it_finished_stays():
    server = Server("device")
    probe(server, server.nano, 0)
    server.take(server.nano, server.activations(index=1, of=2, purpose="probe"))
    server.exchange.drop(NANO)
    assert server.trainer.open_micro_batches == 0
    with pytest.raises(ProtocolError, match="not open"):
        server.exchange.submit(server.nano, server.gradients(index=1, purpose="probe"))
    assert {one.target_tokens for one in server.trainer.probe.take().values()} == {5}
