"""Devices that compute with graphs get them, wait for them, or hear why there are none."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.coordinator import RUN_COMPLETE
from coordinator.graphs import stored
from shared.errors import ModelError, PlanError, QuorumError
from shared.graphs import graph_names
from shared.protocol import chunking, codec
from shared.protocol.messages import DeviceId, Graphs, GraphsRequest, PieceRequest
from shared.protocol.topics import parse
from shared.transport.memory import Faults
from tests.support.backends_with_graphs import WithGraphs
from tests.support.faults import Rule, ScriptedFaults
from tests.support.graph_children import BEHAVIOUR, WAIT_S, contents
from tests.support.simulation import Device, Simulation

NAMES = {
    "graph.embeddings",
    "graph.full_attention.forward",
    "graph.full_attention.backward",
    "graph.full_attention.lowest",
    "graph.full_attention.probe",
    "graph.head",
    "graph.loss",
}


Simulated = Callable[..., Simulation]


@pytest.fixture
def simulated(tmp_path: Path) -> Iterator[Simulated]:
    """Return what builds a simulation, which is closed however the test ends."""
    built: list[Simulation] = []

    def build(
        *,
        rounds: int = 1,
        labels: str = "device",
        faults: Faults | None = None,
        **devices: object,
    ) -> Simulation:
        settings = {
            "devices": {"min": 1, "wait_s": 0, **devices},
            "rounds": {"count": rounds, "steps": 2},
            "plan": {"batch": 2, "micro_batch": 2, "split_layer": 1},
            "lora": {"r": 2},
            "training": {"labels": labels, "max_length": 32},
        }
        built.append(Simulation(tmp_path, settings=settings, faults=faults))
        return built[-1]

    yield build
    for sim in built:
        sim.reporter.close()
        sim.graphs.close()


def add(sim: Simulation, name: str) -> Device:
    return sim.add_device(name, backend=WithGraphs())


def fill_cache(sim: Simulation) -> None:
    stored.save(sim.graphs._folder, contents(sim.graphs._spec))


def is_awaited(sim: Simulation) -> bool:
    return sim.coordinator._supplies.is_awaited


def run_to_the_wait(sim: Simulation) -> None:
    sim.run(until=lambda: is_awaited(sim))


def finish_export(sim: Simulation) -> None:
    """Wait for the child, which knows nothing of the simulation's clock."""
    assert sim.graphs.export is not None
    sim.graphs.export.process.wait(WAIT_S)


def said(sim: Simulation, kind: type) -> list[tuple[str, object]]:
    """Return all messages of one type with the device they are of, or for."""
    joiners: dict[str, chunking.Joiner] = {}
    found = []
    for topic, payload in sim.broker.traffic:
        address = parse(topic)
        if address is None or address.kind == "status":
            continue
        joiner = joiners.setdefault(topic, chunking.Joiner(max_bytes=2**30))
        whole = joiner.add(payload, 0.0)
        if isinstance(whole, chunking.Joined):
            message = codec.decode(whole.payload)
            found += [(address.device, message)] if isinstance(message, kind) else []
    return found


@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_device_gets_exactly_the_graphs_that_it_may_need(simulated, tmp_path, labels):
    sim = simulated(labels=labels)
    fill_cache(sim)
    device = add(sim, "nano")
    sim.run()
    assert device.error is None
    heads = {"graph.head", "graph.loss"} if labels == "server" else set()
    given = device.parts.backend.given
    assert set(given) == NAMES - heads
    made = contents(sim.graphs._spec)
    assert {name: path.read_bytes() for name, path in given.items()} == dict(made)
    assert sim.graphs.export is None


def test_who_has_model_code_asks_for_none(simulated, tmp_path):
    sim = simulated()
    sim.add_device("nano")
    sim.run()
    assert said(sim, GraphsRequest) == []
    assert sim.graphs.found is None
    assert not (tmp_path / "graphs").exists()


def test_what_a_device_has_it_does_not_fetch_again(simulated, tmp_path):
    sim = simulated(rounds=4)
    fill_cache(sim)
    add(sim, "nano")
    sim.run_to("round 3, step 4")
    sim.restart_coordinator()
    sim.run()
    assert len(said(sim, Graphs)) == 2, "a coordinator that was restarted is asked anew"
    asked = Counter(request.sha256 for _, request in said(sim, PieceRequest))
    assert set(asked.values()) == {1}


def test_all_who_wait_are_answered_when_the_graphs_are_made(
    simulated, tmp_path, children, monkeypatch
):
    go = tmp_path / "go"
    monkeypatch.setenv(BEHAVIOUR, f"waits_for:{go}")
    sim = simulated(expected=2, wait_s=3600)
    ada, bob = add(sim, "ada"), add(sim, "bob")
    sim.run(until=lambda: len(sim.coordinator._supplies._waiting) == 2)
    go.touch()
    finish_export(sim)
    sim.run()
    assert (ada.error, bob.error) == (None, None)
    assert set(ada.parts.backend.given) == set(bob.parts.backend.given) == NAMES
    assert [device for device, _ in said(sim, Graphs)] == ["ada", "bob"]


@pytest.mark.parametrize(("kind", "on"), [(GraphsRequest, "requests"), (Graphs, "commands")])
def test_what_is_lost_on_the_way_is_said_again(simulated, tmp_path, children, kind, on):
    name = kind.__dataclass_fields__["type"].default.encode()
    packed = bytes([0xA0 + len(name)]) + name  # as msgpack writes a short text
    lost = Rule(lambda parcel: parcel.kind == on and packed in parcel.payload)
    sim = simulated(faults=ScriptedFaults([lost]))
    device = add(sim, "nano")
    run_to_the_wait(sim)
    finish_export(sim)
    sim.run()
    assert device.error is None
    assert set(device.parts.backend.given) == NAMES
    assert lost.seen == len(said(sim, kind)) == 2


def test_rounds_of_others_go_on_meanwhile(simulated, tmp_path, children, monkeypatch):
    go = tmp_path / "go"
    monkeypatch.setenv(BEHAVIOUR, f"waits_for:{go}")
    sim = simulated(rounds=8, expected=1)
    waits, trains = add(sim, "waits"), sim.add_device("trains")
    sim.run_to("round 3, step 4")
    assert is_awaited(sim)
    assert sim.graphs.export is not None
    assert waits.agent.phase == "waiting for graphs"
    assert trains.error is None
    go.touch()
    finish_export(sim)
    sim.run()
    assert waits.error is None
    assert set(waits.parts.backend.given) == NAMES, "and then it took part"
    assert sim.reporter.summary().devices["waits"].target_tokens > 0


def test_who_waits_says_so_to_its_owner(simulated, children, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(BEHAVIOUR, "is_stuck")
    sim = simulated()
    add(sim, "nano")
    run_to_the_wait(sim)
    told = [one.getMessage() for one in caplog.records if one.name.startswith("edge_agent.")]
    assert told[-1].startswith("asking for graphs to compute with; the first to ask waits")


def test_no_deadline_runs_against_who_waits(simulated, tmp_path, children, monkeypatch):
    go = tmp_path / "go"
    monkeypatch.setenv(BEHAVIOUR, f"waits_for:{go}")
    sim = simulated(join_timeout_s=10, step_timeout_s=10, lost_after_s=6, late_after_s=1)
    device = add(sim, "nano")
    run_to_the_wait(sim)
    sim.run_for(100)
    assert is_awaited(sim)
    go.touch()
    finish_export(sim)
    sim.run()
    assert device.error is None
    assert len(said(sim, GraphsRequest)) == 1, "nor was it asked to repeat itself"


def test_from_the_answer_on_a_deadline_runs_again(simulated, tmp_path, children, monkeypatch):
    monkeypatch.setenv(BEHAVIOUR, "crashes")
    sim = simulated(join_timeout_s=10)
    device = add(sim, "nano")
    run_to_the_wait(sim)
    finish_export(sim)
    with pytest.raises(QuorumError):
        sim.run()
    assert isinstance(device.error, PlanError)


def test_a_failure_is_told_with_its_reason_and_the_next_who_asks_is_served(
    simulated, tmp_path, children, monkeypatch, caplog
):
    monkeypatch.setenv(BEHAVIOUR, "crashes")
    sim = simulated()
    first = add(sim, "first")
    run_to_the_wait(sim)
    finish_export(sim)
    sim.run(until=lambda: first.error is not None)
    assert isinstance(first.error, PlanError)
    assert "no graphs for a device without torch: RuntimeError: the tracer is" in str(first.error)
    assert "first: graphs_request refused: there are no graphs" in caplog.text
    monkeypatch.setenv(BEHAVIOUR, "well")
    second = add(sim, "second")
    run_to_the_wait(sim)
    finish_export(sim)
    sim.run()
    assert second.error is None


def test_a_model_that_cannot_be_exported_is_refused_at_once(simulated, tmp_path, monkeypatch):
    sim = simulated()

    def key(_: object) -> str:
        raise ModelError("sparse attention cannot be exported")

    monkeypatch.setattr("coordinator.graphs.spec.GraphSpec.key", property(key))
    device = add(sim, "nano")
    sim.run(until=lambda: device.error is not None)
    assert isinstance(device.error, PlanError)
    assert "sparse attention" in str(device.error)
    assert sim.graphs.export is None


def test_who_is_gone_is_forgotten(simulated, tmp_path, children, monkeypatch):
    go = tmp_path / "go"
    monkeypatch.setenv(BEHAVIOUR, f"waits_for:{go}")
    sim = simulated()
    add(sim, "gone")
    run_to_the_wait(sim)
    sim.vanish("gone")
    sim.run(until=lambda: not len(sim.coordinator.members.registry))
    assert not is_awaited(sim)
    stays = add(sim, "stays")
    run_to_the_wait(sim)
    go.touch()
    finish_export(sim)
    sim.run(until=lambda: sim.coordinator.finished)
    assert stays.error is None
    assert [device for device, _ in said(sim, Graphs)] == ["stays"]


def test_who_joins_again_is_answered_once_in_its_new_life(
    simulated, tmp_path, children, monkeypatch
):
    go = tmp_path / "go"
    monkeypatch.setenv(BEHAVIOUR, f"waits_for:{go}")
    sim = simulated()
    device = add(sim, "nano")
    run_to_the_wait(sim)
    member = sim.coordinator.members.registry.get(DeviceId("nano"))
    assert member is not None
    sim.coordinator.members.lose(member, "of a test")
    sim.run(until=lambda: is_awaited(sim))
    go.touch()
    finish_export(sim)
    sim.run()
    assert device.error is None
    requests, answers = said(sim, GraphsRequest), said(sim, Graphs)
    assert len({request.call.session for _, request in requests}) == 2
    ((_, answer),) = answers
    assert answer.call == requests[-1][1].call


def test_when_the_run_ends_those_who_wait_hear_it(simulated, tmp_path, children, monkeypatch):
    monkeypatch.setenv(BEHAVIOUR, "is_stuck")
    sim = simulated(expected=1)
    waits, trains = add(sim, "waits"), sim.add_device("trains")
    sim.run()
    assert (waits.error, trains.error) == (None, None)
    assert waits.agent.outcome is not None
    assert waits.agent.outcome.reason == RUN_COMPLETE


def test_who_asks_after_the_end_hears_it_and_nothing_is_made_for_it(simulated, tmp_path):
    sim = simulated()
    sim.add_device("trains")
    sim.run(until=lambda: sim.coordinator.finished)
    late = add(sim, "late")
    sim.run()
    assert late.agent.outcome is not None
    assert late.agent.outcome.reason == RUN_COMPLETE
    assert sim.graphs.export is None
    assert said(sim, Graphs) == []


def test_a_graph_whose_hash_does_not_match_is_fetched_once_more_and_then_refused(
    simulated, tmp_path, monkeypatch
):
    sim = simulated()
    fill_cache(sim)
    device = add(sim, "nano")
    found = sim.graphs.want()
    assert found is not None
    (damaged,) = [piece for piece in found.pieces if piece.name == "graph.head"]
    original = type(found).read

    def read(self, sha256: str, *, offset: int, length: int) -> memoryview:
        data = original(self, sha256, offset=offset, length=length)
        return memoryview(bytes(len(data))) if sha256 == damaged.sha256 else data

    monkeypatch.setattr(type(found), "read", read)
    sim.run(until=lambda: device.error is not None)
    assert isinstance(device.error, ModelError)
    assert f"graph.head: the {damaged.size_bytes} bytes received do not" in str(device.error)
    asked = [one for _, one in said(sim, PieceRequest) if one.sha256 == damaged.sha256]
    assert len(asked) == 2
    assert not list((tmp_path / "cache-nano").glob(f"{damaged.sha256}*")), "nothing is left of it"


def test_a_coordinator_that_lacks_a_graph_is_refused(simulated, tmp_path):
    sim = simulated()
    made = dict(contents(sim.graphs._spec))
    del made["graph.full_attention.probe"]
    stored.save(sim.graphs._folder, made)
    device = add(sim, "nano")
    sim.run(until=lambda: device.error is not None)
    assert isinstance(device.error, ModelError)
    assert "does not offer graph.full_attention.probe" in str(device.error)


def test_the_names_are_those_of_the_shared_table(simulated, tmp_path):
    sim = simulated()
    config = sim.coordinator.members._model.config_json
    assert config == sim.graphs._spec.config_json
    assert set(graph_names(json.loads(config), blocks=range(3), head_on_device=True)) == NAMES
