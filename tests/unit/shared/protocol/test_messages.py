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
    Refusal,
    Resend,
    SessionId,
)
from tests.support.wire_messages import ANSWER_TYPES, MESSAGE_TYPES, REQUEST_TYPES
from tests.support.wire_samples import SAMPLES

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
