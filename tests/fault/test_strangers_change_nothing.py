"""Bytes that are no message, or a forged or repeated one, on the topics of a device.

A broker with the shipped access lists lets nobody but the device itself write there; here
anybody may.
"""

from __future__ import annotations

import dataclasses
import os
import tracemalloc

import msgpack
import numpy as np
import pytest

from shared.errors import VersionMismatchError
from shared.protocol import chunking, codec
from shared.protocol.messages import (
    Activations,
    Call,
    DeviceId,
    Finished,
    Heartbeat,
    HiddenGradients,
    Leave,
    Ready,
    Refusal,
    RunId,
    SessionId,
)
from shared.protocol.tensors import pack
from shared.protocol.topics import agent_filters, device_topic, run_topic
from shared.transport.base import Delivery
from shared.transport.memory import MemoryTransport
from tests.support.outcomes import difference, outcome_of, trio
from tests.support.traffic import message_in, messages

A = DeviceId("a")
RUN = RunId("sim")
TOPICS = [
    device_topic(A, "requests"),
    device_topic(A, "telemetry"),
    run_topic(RUN, A, "activations"),
    run_topic(RUN, A, "adapter"),
    device_topic(A, "commands"),
    run_topic(RUN, A, "gradients"),
    run_topic(RUN, A, "handback"),
    run_topic(RUN, A, "weights"),
]
NOBODY = SessionId("0123456789abcdef")
MANY_BYTES = 300 * 2**20
"""Less than a message may have, more than the test's process should ever take."""


def chunk(payload, transfer=7):
    return b"".join(chunking.cut(payload, transfer=transfer, size=2**18))


def header(total, *, size=2**18, index=0):
    fields = msgpack.packb((7, index, total, size, 0))
    return (b"hc" + bytes([codec.MAJOR, len(fields)]) + fields).ljust(64, b"\0")


def other_version(payload, *, at):
    return payload[:at] + bytes([codec.MAJOR + 1]) + payload[at + 1 :]


LEAVE = codec.encode(Leave(session=NOBODY, reason="I am not even in"))
PAYLOADS = {
    "empty": b"",
    "garbage": b"\xff" * 500,
    "random": np.random.default_rng(1).bytes(5000),
    "a chunk of garbage": chunk(os.urandom(300)),
    "too large a message": header(2**62) + b"\0" * 2**10,
    "too short a chunk": header(2**20) + b"\0" * 100,
    "a header of too many bytes": chunk(b"hs" + bytes([codec.MAJOR, 0]) + b"\xff\xff\xff\x7f"),
    "a map of other things": chunk(
        b"hs" + bytes([codec.MAJOR, 0, 5, 0, 0, 0]) + b"\x81\xa3abc" + bytes(60)
    ),
    "a session that nobody knows": chunk(
        codec.encode(Ready(call=Call(session=NOBODY, number=3, answered_below=3)))
    ),
    "a heartbeat of nobody": chunk(codec.encode(Heartbeat(session=NOBODY, awaiting=(1, 2)))),
    "the goodbye of nobody": chunk(LEAVE),
    "an answer to nobody": chunk(
        codec.encode(Finished(call=Call(session=NOBODY, number=1), reason="ha"))
    ),
}


def stranger_at(sim, *filters):
    transport = MemoryTransport(sim.broker, name="stranger")
    transport.start(filters, timeout_s=1)
    return transport


@pytest.mark.parametrize(
    ("labels", "phase"),
    [
        ("device", "waiting for devices"),
        ("server", "round 1, step 1"),
        ("device", "round 2, step 2"),
    ],
)
def test_no_payload_of_a_stranger_changes_the_outcome(labels, phase, tmp_path, undisturbed):
    sim = trio(tmp_path, labels=labels)
    stranger = stranger_at(sim)
    sim.run_to(phase)
    sim.run_for(0.35)
    for what, payload in PAYLOADS.items():
        for topic in TOPICS:
            stranger.publish(topic, payload)
        sim.run_for(0.05)
        assert [device.error for device in sim.devices.values()] == [None] * 3, what
    sim.run()
    assert difference(outcome_of(sim), undisturbed(labels=labels)) == 0.0


OTHER_VERSIONS = [other_version(chunk(LEAVE), at=2), chunk(other_version(LEAVE, at=2))]


def test_nor_does_one_of_another_version_that_comes_for_a_device_that_is_in(tmp_path, undisturbed):
    sim = trio(tmp_path)
    stranger = stranger_at(sim)
    for phase, payload in zip(("round 1, step 1", "round 2, step 2"), OTHER_VERSIONS, strict=True):
        sim.run_to(phase)
        for topic in TOPICS[:4]:
            stranger.publish(topic, payload)
    sim.run()
    assert [device.error for device in sim.devices.values()] == [None] * 3
    assert difference(outcome_of(sim), undisturbed()) == 0.0


def test_nothing_is_allocated_for_a_message_of_a_stranger_that_is_too_large(tmp_path):
    sim = trio(tmp_path)
    sim.run_to("round 1, step 1")
    stranger = stranger_at(sim)
    stranger.publish(
        device_topic(DeviceId("nobody"), "requests"), header(MANY_BYTES) + bytes(2**18)
    )
    stranger.publish(TOPICS[0], header(2**40) + bytes(2**18))
    tracemalloc.start()
    sim.run_for(1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MANY_BYTES / 10
    sim.run()


def test_a_device_of_another_version_is_told_so(tmp_path, undisturbed):
    sim = trio(tmp_path)
    other = DeviceId("other")
    client = stranger_at(sim, *agent_filters(other))
    client.publish(device_topic(other, "requests"), OTHER_VERSIONS[0])
    sim.run_for(0.5)
    (answer,) = received(client)
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.call) == ("version", None)
    assert "upgrade the older side" in answer.reason
    sim.run()
    assert difference(outcome_of(sim), undisturbed()) == 0.0


def received(client):
    found = []
    while (event := client.receive(0.0)) is not None:
        if isinstance(event, Delivery) and not event.topic.endswith("status"):
            found.append(message_in(event.payload))
    return found


def test_an_agent_that_is_refused_for_its_version_stops(tmp_path):
    sim = trio(tmp_path, devices="ab")
    late = sim.add_device("c", lines=12)
    refusal = Refusal(code="version", reason="upgrade the older side")
    stranger_at(sim).publish(device_topic(DeviceId("c"), "commands"), chunk(codec.encode(refusal)))
    sim.run(until=lambda: late.error is not None)
    assert isinstance(late.error, VersionMismatchError)
    sim.reporter.close()


def replays(sim):
    """All that device a has sent so far, once more, as new transfers."""
    own = [one for one in messages(list(sim.broker.traffic)) if one.address.device == A]
    for number, one in enumerate(own):
        if one.address.kind in ("requests", "activations", "adapter", "telemetry"):
            name = next(t for t in TOPICS if t.name.endswith(f"/{one.address.kind}"))
            yield name, chunk(one.encoded, transfer=1000 + number)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_what_a_device_sent_may_be_sent_again_by_anybody(labels, tmp_path, undisturbed):
    sim = trio(tmp_path, labels=labels)
    stranger = stranger_at(sim)
    for phase in ("round 1, step 1", "round 2, step 2"):
        sim.run_to(phase)
        sim.run_for(0.15)
        for topic, payload in list(replays(sim)):
            stranger.publish(topic, payload)
    sim.run()
    assert [device.error for device in sim.devices.values()] == [None] * 3
    assert difference(outcome_of(sim), undisturbed(labels=labels)) == 0.0


STEP = 3
WHOLE_RUN = 285
"""Target tokens of device a in an undisturbed run."""
FORGERIES = {
    "the same micro-batch under another number": {},
    "of more micro-batches": {"micro_batches": 3},
    "of an earlier step": {"step": 0},
    "of the next step but one": {"step": 4},
    "of another round": {"round": 7},
    "with other lengths": {"lengths": (1,)},
    "with other labels": {"labels": pack(np.zeros(3, dtype=np.int32))},
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forged_micro_batch_of_a_known_session_is_not_counted(how, tmp_path):
    """The forger knows the session; then it can speak for the device, and get it thrown out.

    What it cannot do is to have something counted twice, or to end the run.
    """
    sim = trio(tmp_path, labels="server")
    sim.run_to("round 2, step 3")
    sim.run_for(0.25)
    sent = [m.message for m in messages(sim.broker.traffic) if m.address.device == A]
    trained = [m for m in sent if isinstance(m, Activations) and m.purpose == "train"]
    real = trained[-1]
    call = dataclasses.replace(real.call, number=real.call.number + 40)
    forged = dataclasses.replace(real, call=call, **FORGERIES[how])
    stranger_at(sim).publish(run_topic(RUN, A, "activations"), chunk(codec.encode(forged)))
    sim.run()
    assert sim.coordinator.finished
    before = sum(m.target_tokens for m in trained if m.step < STEP)
    assert outcome_of(sim).tokens["a"] in (before, WHOLE_RUN), "something was counted in part"


def test_a_gradient_that_nobody_waits_for_is_refused(tmp_path, undisturbed):
    sim = trio(tmp_path)
    sim.run_to("round 2, step 3")
    sent = [m.message for m in messages(sim.broker.traffic) if m.address.device == A]
    real = [m for m in sent if isinstance(m, HiddenGradients)][-1]
    call = dataclasses.replace(real.call, number=real.call.number + 40)
    client = stranger_at(sim, *agent_filters(A))
    received(client)
    forged = dataclasses.replace(real, call=call)
    client.publish(run_topic(RUN, A, "activations"), chunk(codec.encode(forged)))
    sim.run_for(0.25)
    (refusal,) = [m for m in received(client) if isinstance(m, Refusal)]
    assert refusal.code == "bad_request"
    assert "not open" in refusal.reason
    sim.run()
    assert difference(outcome_of(sim), undisturbed()) == 0.0
