"""Graphs without a run: `hsplit-coordinator graphs` writes, `hsplit-agent profile` reads them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest

from coordinator.graphs import command
from coordinator.graphs.library import GraphLibrary, graph_cache
from shared import profile_file
from shared.clock import SystemClock
from shared.errors import ConfigError, ModelError, PlanError, StorageError
from tests.support.graph_files import put_in_cache
from tests.testbed import small_run
from tests.testbed.in_process import Ended, agent_main, coordinator_main

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

MODEL = ("--model", str(small_run.BASE))
SMALL = ("--threads", "1", "--micro-batch", "2", "--length", "16", "--device-id", "nano")
NAMES = {
    *("graph.embeddings", "graph.head", "graph.loss"),
    *(f"graph.full_attention.{way}" for way in ("forward", "backward", "lowest", "probe")),
}


@contextlib.contextmanager
def own_folders(folder: Path) -> Iterator[None]:
    own = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
    with mock.patch.dict(os.environ, {**own, "HF_HUB_OFFLINE": "1"}):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user whose cache has the base's graphs, as after a first run or export."""
    folder = tmp_path_factory.mktemp("home")
    with own_folders(folder):
        spec = command._spec(command.Wanted(model=str(small_run.BASE)))
        put_in_cache(GraphLibrary(spec, graph_cache(), SystemClock()))
        yield folder


@pytest.fixture(scope="module")
def written(home) -> tuple[Ended, Path]:
    """Graphs of a model of which nothing is there but its configuration."""
    model = home / "tiny"
    model.mkdir()
    shutil.copy(small_run.BASE / "config.json", model)
    folder = home / "graphs"
    return coordinator_main("graphs", str(model), "--out", str(folder)), folder


def test_every_graph_is_a_file_of_its_name(written):
    ended, folder = written
    assert ended.code == 0, ended.words
    assert ended.output.startswith(f"{len(NAMES)} graphs of ")
    assert ended.output.endswith(f" kB in {folder}\n")
    assert {file.name for file in folder.iterdir()} == {f"{name}.onnx" for name in NAMES}
    assert "exporting" not in ended.words, "they are in the cache"


def test_a_device_without_torch_is_measured_with_them(written, tmp_path):
    """The real probe, in its child process; the planner gets what it made."""
    _, folder = written
    file = tmp_path / "nano.json"
    flags = ("--backend", "onnx", "--graphs", str(folder), "--output", str(file))
    ended = agent_main("profile", *MODEL, *SMALL, *flags)
    assert ended.code == 0, ended.words
    computes_with = f"onnxruntime {metadata.version('onnxruntime')}, CPUExecutionProvider"
    assert "onnx on the CPU, float32" in ended.output
    assert computes_with in ended.output
    found = profile_file.read(file).measurements
    assert (found.backend, found.computes_with) == ("onnx", computes_with)
    assert found.head, "labels are on the device, and so is the head"
    assert {point.blocks for point in found.blocks} == {1, 3}


@pytest.mark.usefixtures("home")
def test_a_folder_that_lacks_a_graph_is_told_with_what_to_run(written, tmp_path):
    folder = tmp_path / "graphs"
    shutil.copytree(written[1], folder)
    (folder / "graph.loss.onnx").unlink()
    flags = ("--backend", "onnx", "--graphs", str(folder))
    ended = agent_main("profile", *MODEL, *SMALL, *flags)
    assert ended.code == ConfigError.exit_code
    assert f"{folder} lacks graph.loss.onnx, which tiny-gpt2" in ended.words
    again = f"hsplit-coordinator graphs {small_run.BASE} --labels device --out {folder}"
    assert again in ended.words
    assert coordinator_main(*again.split()[1:]).code == 0
    assert (folder / "graph.loss.onnx").is_file()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([*MODEL, "--backend", "onnx"], "hsplit-coordinator graphs"),
        ([*MODEL, "--backend", "torch", "--graphs", "."], "add --backend onnx"),
        (["--backend", "onnx", "--graphs", "."], "add --model"),
        ([*MODEL, "--backend", "onnx", "--graphs", "/none"], "lacks graph.embeddings.onnx and 6"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("home")
def test_graphs_that_do_not_go_with_the_rest_are_refused(flags, part):
    ended = agent_main("profile", *flags, "--device-id", "nano")
    assert ended.code == ConfigError.exit_code
    assert part in ended.words
    assert "Traceback" not in ended.words


@pytest.mark.parametrize(
    ("flags", "error", "part"),
    [
        (["./none"], ModelError, "./none: no such folder"),
        (["nobody/none"], ModelError, "nobody/none"),
        ([str(small_run.BASE), "--target-modules", "q_proj"], PlanError, "'q_proj' does not exist"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("home")
def test_a_model_or_a_target_that_is_not_there_is_told_at_once(flags, error, part, tmp_path):
    ended = coordinator_main("graphs", *flags, "--out", str(tmp_path / "graphs"))
    assert ended.code == error.exit_code
    assert part in ended.words
    assert "exporting" not in ended.words
    assert not (tmp_path / "graphs").exists()


@pytest.mark.usefixtures("home")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    ended = coordinator_main("graphs", str(small_run.BASE), "--out", str(tmp_path / "file" / "x"))
    assert ended.code == StorageError.exit_code
    assert str(tmp_path / "file" / "x") in ended.words


@pytest.mark.usefixtures("home")
def test_the_run_and_the_command_ask_for_the_same_graphs(tmp_path):
    """So that whichever comes first exports for both."""
    wanted = command.Wanted(model=str(small_run.BASE), target_modules=("c_attn",))
    by_default, stated = command._spec(command.Wanted(model=wanted.model)), command._spec(wanted)
    assert stated.key == by_default.key, "c_attn is the family's default"
    other = command.Wanted(model=wanted.model, target_modules=("c_attn", "c_fc"))
    assert command._spec(other).key != by_default.key
