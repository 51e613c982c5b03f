"""The limits in the types of messages are kept: what breaks one is refused by the codec."""

from __future__ import annotations

import dataclasses

import pytest

from shared.errors import CodecError
from shared.protocol import codec
from shared.protocol.messages import (
    Activations,
    Call,
    DeviceProfile,
    EvaluatedLoss,
    JoinRequest,
    Leave,
    Piece,
    Ready,
    Refusal,
    Resend,
    SessionId,
)
from shared.protocol.profile import OptimizerPoint
from tests.support.wire_messages import ANSWER_TYPES, MESSAGE_TYPES, REQUEST_TYPES
from tests.support.wire_samples import MEASUREMENTS, SAMPLES

CALL = Call(session=SessionId("0123456789abcdef"), number=1)
PROFILE = DeviceProfile(backend="torch", hsplit_version="0.1", sequences=1, evaluation_sequences=0)


def refused(message: object, where: str) -> None:
    with pytest.raises(CodecError, match=where):
        codec.decode(codec.encode(message))


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.__name__)
def test_a_type_is_named_after_its_class_and_documented(kind):
    words = "".join("_" + c.lower() if c.isupper() else c for c in kind.__name__).lstrip("_")
    assert {f.name: f.default for f in dataclasses.fields(kind)}["type"] == words
    assert kind.__doc__.startswith(("Agent: ", "Coordinator: ", "Receiver of"))


def test_every_request_names_its_call_and_only_what_answers_names_one_too():
    having = {k for k in MESSAGE_TYPES if "call" in {f.name for f in dataclasses.fields(k)}}
    assert having == {*REQUEST_TYPES, *ANSWER_TYPES}


@pytest.mark.parametrize("session", ["", "0123", "0123456789ABCDEF", "0123456789abcdef\n"])
def test_a_session_is_sixteen_small_hexadecimal_digits(session):
    refused(Leave(session=SessionId(session), reason=""), r"leave\.session")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0, 1e12])
def test_a_loss_is_finite_and_not_negative(loss):
    refused(EvaluatedLoss(call=CALL, loss_sum=loss), r"evaluated_loss\.loss_sum")


@pytest.mark.parametrize("number", [-1, 2**63])
def test_a_count_is_not_negative_and_no_larger_than_any_side_can_hold(number):
    call = Call(session=CALL.session, number=number)
    refused(JoinRequest(call=call, profile=PROFILE), r"join_request\.call\.number")


def test_a_device_without_a_sequence_does_not_join():
    profile = dataclasses.replace(PROFILE, sequences=0)
    refused(JoinRequest(call=CALL, profile=profile), r"join_request\.profile\.sequences")


@pytest.mark.parametrize("name", ["", "block", "block.", "block.12345", "../head", "head\n"])
def test_a_piece_has_one_of_the_known_names(name):
    piece = Piece(name=name, sha256="0" * 64, size_bytes=1)
    model = dataclasses.replace(SAMPLES["welcome"].model, pieces=(piece,))
    refused(dataclasses.replace(SAMPLES["welcome"], model=model), "pieces.0.name")


def test_text_is_bounded_and_an_unknown_code_refused():
    refused(Refusal(code="stale", reason="x" * 4097), r"refusal\.reason")
    refused(Refusal(code="bored", reason=""), r"refusal\.code")


def test_a_resend_asks_for_something():
    refused(Resend(session=CALL.session, numbers=()), r"resend\.numbers")


@pytest.mark.parametrize("lengths", [(), (0,), (3, -1)])
def test_activations_are_of_sequences_that_have_tokens(lengths):
    message = dataclasses.replace(SAMPLES["activations"], lengths=lengths)
    assert isinstance(message, Activations)
    refused(message, r"activations\.lengths")


def test_a_tensor_is_a_tensor():
    refused(dataclasses.replace(SAMPLES["hidden"], hidden=b"bytes"), r"hidden\.hidden")


NONSENSE = (0.0, -1.0, float("nan"), float("inf"))
BLOCK_POINT = MEASUREMENTS.blocks[0]
HEAD_POINT = MEASUREMENTS.head[0]
LINK = MEASUREMENTS.link
TELEMETRY = SAMPLES["heartbeat"].telemetry


def ready_with(**changes: object) -> Ready:
    return dataclasses.replace(
        SAMPLES["ready"], measurements=dataclasses.replace(MEASUREMENTS, **changes)
    )


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("field", ["forward_s", "backward_s"])
def test_a_block_that_took_no_time_was_not_measured(field, value):
    point = dataclasses.replace(BLOCK_POINT, **{field: value})
    message = ready_with(blocks=(BLOCK_POINT, point, BLOCK_POINT))
    refused(message, rf"ready\.measurements\.blocks\.1\.{field}")


@pytest.mark.parametrize("value", NONSENSE)
def test_a_head_or_an_optimizer_that_took_no_time_was_not_measured(value):
    head = dataclasses.replace(HEAD_POINT, seconds=value)
    refused(ready_with(head=(head,)), r"measurements\.head\.0\.seconds")
    step = OptimizerPoint(adapter_parameters=8, seconds=value)
    refused(ready_with(optimizer=(step,)), r"measurements\.optimizer\.0\.seconds")


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("field", ["uplink_bytes_per_s", "downlink_bytes_per_s", "round_trip_s"])
def test_a_link_without_a_rate_was_not_measured(field, value):
    link = dataclasses.replace(LINK, **{field: value})
    refused(ready_with(link=link), rf"measurements\.link\.{field}")


@pytest.mark.parametrize("value", [0, -1, 2**63])
def test_measured_memory_is_some(value):
    point = dataclasses.replace(BLOCK_POINT, peak_bytes=value)
    refused(ready_with(blocks=(point,) * 3), r"measurements\.blocks\.0\.peak_bytes")
    refused(ready_with(runtime_bytes=value), r"measurements\.runtime_bytes")
    refused(ready_with(memory_bytes=value), r"measurements\.memory_bytes")


@pytest.mark.parametrize("spread", [-0.1, float("nan"), float("inf")])
def test_a_spread_is_a_share(spread):
    point = dataclasses.replace(BLOCK_POINT, spread=spread)
    refused(ready_with(blocks=(point,) * 3), r"blocks\.0\.spread")


@pytest.mark.parametrize("count", [0, 1, 2, 65])
def test_measurements_are_of_so_many_points_that_a_line_can_be_drawn(count):
    refused(ready_with(blocks=(BLOCK_POINT,) * count), r"measurements\.blocks")


def test_measurements_name_the_model_by_its_fingerprint():
    refused(ready_with(model="gpt2"), r"measurements\.model")


@pytest.mark.parametrize("field", ["mean_length", "padded_length"])
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_sequences_have_at_least_one_token(field, value):
    data = dataclasses.replace(SAMPLES["ready"].data, **{field: value})
    refused(dataclasses.replace(SAMPLES["ready"], data=data), rf"ready\.data\.{field}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e9])
@pytest.mark.parametrize(
    "field",
    [
        "accelerator_load_percent",
        "accelerator_clock_mhz",
        "cpu_load_percent",
        "temperature_c",
        "power_w",
    ],
)
def test_a_reading_is_a_number(field, value):
    telemetry = dataclasses.replace(TELEMETRY, **{field: value})
    beat = dataclasses.replace(SAMPLES["heartbeat"], telemetry=telemetry)
    refused(beat, rf"heartbeat\.telemetry\.{field}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_importance_is_finite_and_not_negative(value):
    result = dataclasses.replace(SAMPLES["evaluation_result"], importance={"h.0.q": value})
    refused(result, r"evaluation_result\.importance\.h\.0\.q")


def test_a_device_measures_with_one_sequence_or_more():
    refused(dataclasses.replace(SAMPLES["welcome"], measure_at=0), r"welcome\.measure_at")
