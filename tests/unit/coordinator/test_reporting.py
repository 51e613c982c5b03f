"""What a run reports: means over tokens, perplexities, traffic, and tallies that survive."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import pytest

from coordinator.aggregation import Aggregated
from coordinator.metrics import MetricsWriter
from coordinator.planning.device_plan import DevicePlan, ranks_in_short
from coordinator.reporting import Reporter, Tallies
from shared.class_counts import ClassCount
from shared.protocol.messages import (
    Call,
    DeviceId,
    EvaluationResult,
    Leave,
    RoundResult,
    RunId,
    SessionId,
)
from shared.protocol.topics import agent_filters, coordinator_filters, device_topic
from shared.transport.link import MessageLink
from shared.transport.memory import MemoryBroker, MemoryTransport
from tests.support.fake_clock import FakeClock
from tests.support.metrics import read_metrics

NANO, ORIN = DeviceId("nano"), DeviceId("orin")
CALL = Call(session=SessionId("0" * 16), number=0)
PLAN = DevicePlan(
    split_layer=2, ranks={"h.0.q": 4}, scalings={}, batch=8, micro_batch=8, in_flight=1
)
NOTHING = Aggregated(update={}, weights={}, reports={})


class Desk:
    """A reporter, its clock, its files and the link whose bytes it counts."""

    def __init__(self, folder, tallies=None):
        self.folder = folder
        self.clock = FakeClock()
        broker = MemoryBroker(self.clock)
        self.link = MessageLink(MemoryTransport(broker, name="coordinator"), self.clock)
        self.link.start(coordinator_filters(RunId("run")), timeout_s=1)
        self.nano = MessageLink(MemoryTransport(broker, name="nano"), self.clock)
        self.nano.start(agent_filters(NANO), timeout_s=1)
        self.reporter = Reporter(
            MetricsWriter(folder, self.clock, tensorboard=False),
            self.link,
            self.clock,
            total_steps=10,
            tallies=tallies or Tallies(),
        )

    def last(self):
        return read_metrics(self.folder)[-1]

    def traffic(self):
        """Let one message go each way; return the bytes (up, down)."""
        for link, kind in ((self.nano, "requests"), (self.link, "commands")):
            link.send(device_topic(NANO, kind), Leave(session=CALL.session, reason="x"))
        while self.link.receive(0) or self.nano.receive(0):
            pass
        return self.link.bytes_received.total(), self.link.bytes_sent.total()

    def close_round(self, number=1, *, alone=(), results=None, tokens=None):
        self.reporter.round_closed(
            number,
            number * 2,
            aggregated=NOTHING,
            tokens={NANO: 30, ORIN: 10} if tokens is None else tokens,
            results=results or {},
            telemetry={},
            server_busy_s=0.5,
            alone=alone,
        )


@pytest.fixture
def desk(tmp_path):
    made = Desk(tmp_path)
    yield made
    made.reporter.close()


def evaluation(loss_sum, target_tokens):
    return EvaluationResult(
        call=CALL, round=1, loss_sum=loss_sum, target_tokens=target_tokens, sequences=1
    )


def result(loss_sum, target_tokens):
    return RoundResult(
        call=CALL,
        round=1,
        adapters=(),
        loss_sum=loss_sum,
        target_tokens=target_tokens,
        steps=2,
        busy_s=1.5,
    )


def close_step(desk, step, *devices):
    desk.reporter.step_closed(1, step, devices=devices, gradient_norm=0.5, learning_rate=0.1)


def test_a_steps_loss_is_the_mean_over_its_tokens_and_the_next_begins_anew(desk):
    desk.reporter.micro_batch(NANO, 30.0, 10)
    desk.reporter.micro_batch(ORIN, 10.0, 30)
    close_step(desk, 0, NANO, ORIN)
    line = desk.last()
    assert (line["step"], line["round"], line["train/loss"]) == (1, 1, 1.0)
    assert (line["train/target_tokens"], line["train/server_gradient_norm"]) == (40.0, 0.5)
    desk.reporter.micro_batch(NANO, 8.0, 4)
    close_step(desk, 1, NANO)
    assert desk.last()["train/loss"] == 2.0


def test_the_loss_of_a_device_that_was_lost_in_the_step_does_not_count(desk):
    desk.reporter.micro_batch(NANO, 30.0, 10)
    desk.reporter.micro_batch(ORIN, 999.0, 1)
    close_step(desk, 0, NANO)
    assert desk.last()["train/loss"] == 3.0


def test_held_out_perplexity_is_over_the_tokens_of_all_devices(desk):
    desk.reporter.evaluated(NANO, evaluation(20.0, 10))
    desk.reporter.evaluated(ORIN, evaluation(30.0, 30))
    desk.reporter.evaluation_closed(1, 0)
    line = desk.last()
    assert line["eval/loss"] == 1.25
    assert line["eval/perplexity"] == pytest.approx(math.exp(1.25))
    assert line["device/nano/perplexity"] == pytest.approx(math.exp(2.0))
    assert (line["round"], line["step"]) == (0, 0), "of the state that the round starts from"


def test_the_first_perplexity_stays_and_the_last_is_the_latest(desk):
    for round_, loss in enumerate((30.0, 20.0, 10.0), start=1):
        desk.reporter.evaluated(NANO, evaluation(loss, 10))
        desk.reporter.evaluation_closed(round_, (round_ - 1) * 5)
    summary = desk.reporter.summary()
    assert summary.perplexity_before == pytest.approx(math.exp(3.0))
    assert summary.perplexity_after == pytest.approx(math.exp(1.0))


def test_a_run_without_held_out_text_has_no_perplexity(desk):
    desk.reporter.evaluated(NANO, evaluation(0.0, 0))
    desk.reporter.evaluation_closed(1, 0)
    assert read_metrics(desk.folder) == []
    assert desk.reporter.summary().perplexity_before is None


def test_a_diverged_model_has_an_infinite_perplexity_and_no_crash(desk):
    desk.reporter.evaluated(NANO, evaluation(1e11, 1))
    desk.reporter.evaluation_closed(1, 0)
    assert desk.last()["eval/perplexity"] is None, "JSON has no infinity"
    assert desk.reporter.summary().perplexity_after is None, "nor has a checkpoint"


def test_a_device_that_trains_alone_brings_its_loss_with_its_adapters(desk):
    desk.reporter.micro_batch(NANO, 10.0, 10)
    close_step(desk, 0, NANO)
    desk.close_round(alone={ORIN}, results={NANO: result(999.0, 10), ORIN: result(50.0, 10)})
    line = desk.last()
    assert line["round/train_loss"] == 3.0, "nano's was counted as it came"
    assert (line["device/orin/busy_s"], line["device/nano/target_tokens"]) == (1.5, 30.0)


def test_tokens_add_up_over_rounds(desk):
    desk.reporter.round_started(1, of=2, plans={NANO: PLAN, ORIN: PLAN})
    desk.close_round(1)
    desk.close_round(2, tokens={NANO: 5})
    devices = desk.reporter.summary().devices
    assert {d: s.target_tokens for d, s in devices.items()} == {NANO: 35, ORIN: 10}
    assert (devices[NANO].split_layer, devices[NANO].ranks) == (2, {"h.0.q": 4})


def test_seconds_and_bytes_go_on_from_the_tallies_of_a_checkpoint(tmp_path):
    first = Desk(tmp_path / "run")
    first.clock.advance(50.0)
    up, down = first.traffic()
    assert up > 0
    assert down > 0
    first.reporter.round_started(1, of=2, plans={NANO: PLAN})
    first.close_round()
    stored = json.loads(json.dumps(first.reporter.state()))
    first.reporter.close()
    second = Desk(tmp_path / "run", Tallies.restored(stored))
    second.clock.advance(7.0)
    more_up, more_down = second.traffic()
    summary = second.reporter.summary()
    second.reporter.close()
    assert (summary.seconds, summary.steps) == (57.0, 2)
    assert (summary.bytes_up, summary.bytes_down) == (up + more_up, down + more_down)
    assert summary.devices[NANO].target_tokens == 30


@pytest.mark.parametrize(
    ("ranks", "short"),
    [({}, "none"), ({"a": 8, "b": 8}, "8"), ({"a": 4, "b": 16, "c": 8}, "4 to 16 (3 modules)")],
)
def test_ranks_are_said_in_short(ranks, short):
    assert ranks_in_short(ranks) == short


def classified(right, of):
    """Return the evaluation of a device that has the second class only."""
    counts = (
        ClassCount(actual=0, predicted=of - right, true_positives=0),
        ClassCount(actual=of, predicted=right, true_positives=right),
    )
    return dataclasses.replace(evaluation(0.5 * of, of), counts=counts)


def test_a_classifier_has_scores_over_all_devices_and_no_perplexity(desk, caplog):
    desk.reporter.evaluated(NANO, classified(3, 4))
    desk.reporter.evaluated(ORIN, classified(6, 12))
    with caplog.at_level(logging.INFO):
        desk.reporter.evaluation_closed(1, 0)
    line = desk.last()
    assert (line["eval/loss"], line["eval/accuracy"]) == (0.5, 9 / 16)
    assert line["eval/f1"] == pytest.approx(2 * 9 / (16 + 9))
    assert line["eval/f1_macro"] == pytest.approx(9 / 25)
    assert line["device/nano/accuracy"] == 0.75
    assert not any("perplexity" in name for name in line)
    assert "held-out accuracy 56.2%, F1 72.0% (devices: 2)" in caplog.text
    desk.reporter.evaluated(NANO, classified(4, 4))
    desk.reporter.evaluated(ORIN, classified(12, 12))
    desk.reporter.evaluation_closed(2, 2)
    summary = desk.reporter.summary()
    assert (summary.accuracy_before, summary.accuracy_after) == (9 / 16, 1.0)
    assert (summary.f1_after, summary.perplexity_after) == (1.0, None)
    kept = Tallies.restored(json.loads(json.dumps(desk.reporter.state())))
    assert kept.f1_before == summary.f1_before
    desk.reporter.not_evaluated()
    assert desk.reporter.summary().accuracy_after is None


def test_tallies_of_an_older_checkpoint_are_taken(desk):
    state = dict(desk.reporter.state())
    del state["accuracy_before"], state["f1_after"]
    assert Tallies.restored(state).accuracy_before is None
