"""Graphs are made once, by a child process that nobody waits for, and all its ends are known."""

from __future__ import annotations

import dataclasses
import logging
import os
from importlib import metadata

import pytest

from coordinator.graphs import exporting, stored
from coordinator.graphs import spec as spec_module
from coordinator.graphs.exporting import LIMIT_S, Export
from coordinator.graphs.library import GraphLibrary
from coordinator.graphs.stored import StoredGraphs
from shared.clock import SystemClock
from shared.errors import PlanError
from tests.support.fake_clock import FakeClock
from tests.support.graph_children import BEHAVIOUR, WAIT_S, contents, spec


def library(folder, of=None, clock=None) -> GraphLibrary:
    return GraphLibrary(of or spec(), folder, clock or FakeClock())


def outcome(of: GraphLibrary, *, within_s: float = WAIT_S) -> StoredGraphs | PlanError:
    """Wait for the child; return what the library makes of its end."""
    assert of.export is not None
    of.export.process.wait(within_s)
    made = of.poll()
    assert made is not None
    assert of.poll() is None, "it is said once"
    return made


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_s_graphs_are_exported_once_and_then_found(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    wanted = spec("llama", labels="server")  # the least to export: no embeddings, no head
    first = library(tmp_path, wanted, SystemClock())
    assert first.want() is None
    assert first.want() is None, "and not twice at once"
    assert first.poll() is None
    made = outcome(first, within_s=500)
    assert isinstance(made, StoredGraphs)
    assert {piece.name for piece in made.pieces} == set(contents(wanted))
    assert first.want() is made
    assert "once for its architecture" in caplog.text
    assert "4 graphs of" in caplog.text
    second = library(tmp_path, dataclasses.replace(wanted))
    found = second.want()
    assert second.export is None
    assert found is not None
    assert found.pieces == made.pieces


def test_while_a_child_works_there_is_nothing_and_its_graphs_come_once(tmp_path, children):
    makes = library(tmp_path)
    assert makes.poll() is None, "nobody asked"
    assert makes.want() is None
    made = outcome(makes)
    assert isinstance(made, StoredGraphs)
    assert makes.export is None
    assert makes.want() is made


ENDS = {
    "crashes": "RuntimeError: the tracer is broken",
    "refuses": "block 0 of this model cannot be exported",
    "is_killed": "the system killed it: the memory is full",
}


@pytest.mark.parametrize("behaviour", ENDS)
def test_how_a_child_failed_is_said_and_the_next_request_tries_again(
    tmp_path, children, monkeypatch, behaviour
):
    monkeypatch.setenv(BEHAVIOUR, behaviour)
    makes = library(tmp_path)
    assert makes.want() is None
    failed = outcome(makes)
    assert isinstance(failed, PlanError)
    assert str(failed) == f"there are no graphs for a device without torch: {ENDS[behaviour]}"
    monkeypatch.setenv(BEHAVIOUR, "well")
    assert makes.want() is None
    assert isinstance(outcome(makes), StoredGraphs)


def test_a_child_that_would_never_end_is_ended(tmp_path, children, monkeypatch):
    monkeypatch.setenv(BEHAVIOUR, "is_stuck")
    clock = FakeClock()
    makes = library(tmp_path, clock=clock)
    makes.want()
    assert makes.export is not None
    pid = makes.export.process.pid
    clock.advance(LIMIT_S - 1)
    assert makes.poll() is None
    clock.advance(1)
    failed = makes.poll()
    assert isinstance(failed, PlanError)
    assert "it took more than 1800 s" in str(failed)
    assert not is_alive(pid), "and reaped"


def test_who_closes_the_library_ends_its_child(tmp_path, children, monkeypatch):
    monkeypatch.setenv(BEHAVIOUR, "is_stuck")
    makes = library(tmp_path)
    makes.want()
    assert makes.export is not None
    process = makes.export.process
    makes.close()
    assert process.returncode == -9
    assert not is_alive(process.pid)
    makes.close()


def test_a_damaged_cache_is_not_served_but_made_anew(tmp_path, children):
    first = library(tmp_path)
    first.want()
    outcome(first)
    (folder,) = tmp_path.iterdir()
    next(folder.glob("*.onnx")).write_bytes(b"damaged")
    again = library(tmp_path)
    assert again.want() is None
    assert again.export is not None
    assert isinstance(outcome(again), StoredGraphs)


def test_other_terms_have_a_folder_of_their_own(tmp_path, children):
    for wanted in (spec(), spec(labels="server")):
        makes = library(tmp_path, wanted)
        assert makes.want() is None
        outcome(makes)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path, children):
    (tmp_path / "cache").write_text("a file stands here")
    makes = library(tmp_path / "cache")
    assert makes.want() is None
    failed = outcome(makes)
    assert isinstance(failed, PlanError)
    assert "cannot be written" in str(failed)


def test_a_child_that_left_nothing_behind_is_a_failure(tmp_path, children):
    makes = library(tmp_path)
    makes.want()
    assert makes.export is not None
    makes.export.process.wait(WAIT_S)
    (folder,) = tmp_path.iterdir()
    (folder / stored.INDEX).unlink()
    failed = makes.poll()
    assert isinstance(failed, PlanError)
    assert "cannot be read back" in str(failed)


def test_what_is_known_to_be_impossible_is_refused_without_a_child(tmp_path):
    makes = library(tmp_path, dataclasses.replace(spec(), config_json='{"model_type": "mamba"}'))
    with pytest.raises(PlanError, match=r"no graphs for a device without torch: .*mamba"):
        makes.want()
    assert makes.export is None


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(spec_module.metadata, "version", version)
    with pytest.raises(PlanError, match=r"is not installed here: pip install 'hsplit\[coord"):
        library(tmp_path).want()


def test_a_child_that_cannot_be_started_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(PlanError, match="No such file"):
        library(tmp_path).want()


def test_a_spec_of_any_length_is_told_without_waiting_for_the_child(tmp_path, children):
    """A pipe would hold 64 KiB, and the rest would wait for the child to read."""
    long = spec().config_json[:-1] + ', "comment": "' + "x" * 250_000 + '"}'
    export = Export(dataclasses.replace(spec(), config_json=long), tmp_path, FakeClock())
    assert export.process.wait(WAIT_S) == 0
    assert stored.load(tmp_path) is not None
