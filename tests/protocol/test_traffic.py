"""What programs really say stands in the tables of the AsyncAPI file, topic by topic."""

from __future__ import annotations

from collections import defaultdict

import pytest

from shared.protocol import chunking, codec
from shared.protocol.asyncapi import ANSWERS, FROM_COORDINATOR, FROM_DEVICE
from shared.protocol.topics import parse
from tests.support.faults import RandomFaults
from tests.support.simulation import Simulation

SETTINGS = {
    "devices": {"min": 2, "expected": 2, "wait_s": 0},
    "rounds": {"count": 2, "steps": 1},
    "plan": {"batch": 2, "micro_batch": 1, "split_layer": 1},
    "lora": {"r": 2},
}


def traffic_of(sim: Simulation):
    """Return every message that was sent: its kind of topic and itself."""
    joiners = defaultdict(lambda: chunking.Joiner(max_bytes=2**30))
    for topic, payload in sim.broker.traffic:
        address = parse(topic)
        if address is None or address.kind == "status":
            continue
        whole = joiners[topic].add(payload, 0.0)
        if isinstance(whole, chunking.Joined):
            yield address.kind, codec.decode(whole.payload)


@pytest.mark.parametrize("labels", ["device", "server"])
def test_what_is_said_and_answered_stands_in_the_tables(tmp_path, labels):
    faults = RandomFaults(seed=3, drop=0.02)  # so that more than the smooth way is seen
    settings = {**SETTINGS, "training": {"labels": labels, "max_length": 32}}
    sim = Simulation(tmp_path, settings=settings, faults=faults, max_payload_bytes=6000)
    for name in ("ada", "bob"):
        sim.add_device(name)
    sim.run()
    tables = {**FROM_DEVICE, **FROM_COORDINATOR}
    asked, said = {}, defaultdict(set)
    for kind, message in traffic_of(sim):
        assert message.type in tables[kind], f"{message.type} on {kind}"
        said[kind].add(message.type)
        call = getattr(message, "call", None)
        if call is not None and message.type in ANSWERS:
            asked[call.session, call.number] = message.type
        elif call is not None and message.type != "refusal":
            assert message.type in ANSWERS[asked[call.session, call.number]]
    assert set(said) == set(tables), "every topic was used"
