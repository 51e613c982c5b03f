"""What only the onnx backend can meet: graphs that do not fit, a full memory, a process for it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.backends.base import FrontBase, MicroBatch
from edge_agent.backends.onnx_backend import OnnxBackend
from shared.adapters import LoraPair, ModuleAdapter
from shared.errors import ModelError, ProtocolError
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms
from tests.support import onnx_child
from tests.support.loaded_backends import front_base
from tests.support.tiny_models import tiny_batch, tiny_model

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def base(tmp_path) -> FrontBase:
    return front_base("onnx", tiny_model("gpt2"), tmp_path, split_layer=3, lora=LoraTerms())


def load(base: FrontBase) -> OnnxBackend:
    backend = OnnxBackend("cpu", threads=1)
    backend.load(
        base,
        device_id=DeviceId("nano"),
        training=onnx_child.TRAINING,
        lora=onnx_child.LORA,
        optimizer=onnx_child.OPTIMIZER,
    )
    return backend


def without(base: FrontBase, graph: str) -> FrontBase:
    graphs = {name: file for name, file in base.graphs.items() if name != graph}
    return dataclasses.replace(base, graphs=graphs)


@pytest.mark.parametrize(
    "graph",
    [
        "graph.embeddings",
        "graph.full_attention.forward",
        "graph.full_attention.backward",
        "graph.full_attention.lowest",
        "graph.head",
        "graph.loss",
    ],
)
def test_a_graph_that_is_not_there_is_named_before_training(graph, base):
    with pytest.raises(ModelError, match=rf"the coordinator gave no {graph}, which"):
        load(without(base, graph))


@pytest.mark.parametrize(
    ("change", "weight"),
    [
        ({"n_embd": 64}, r"transformer\.h\.0\.attn\.c_attn\.weight"),
        ({"n_inner": 100}, r"transformer\.h\.0\.mlp\.c_fc\.weight"),
        ({"n_positions": 80}, r"transformer\.wpe\.weight"),
        ({"vocab_size": 120}, r"transformer\.wte\.weight"),
    ],
)
def test_graphs_of_another_model_are_refused(change, weight, base, tmp_path):
    other = tiny_model("gpt2", **change).front_base(tmp_path, split_layer=3, head=True)
    with pytest.raises(ModelError, match=rf"weight {weight} has shape .* not of the same model"):
        load(dataclasses.replace(other, graphs=base.graphs))


def test_weights_that_are_deleted_while_they_are_used_are_used_on(base):
    """As torch does: somebody empties the cache of an agent that trains."""
    backend, batch = load(base), tiny_batch((3, 5))
    before = backend.whole(MicroBatch(0, 0), batch, train=False)
    for file in base.files.values():
        file.unlink()
    assert backend.whole(MicroBatch(0, 1), batch, train=False) == before


def test_weights_that_are_gone_before_they_are_used_are_said_so(base):
    backend = load(base)
    base.files["embeddings"].unlink()
    with pytest.raises(ModelError, match=r"embeddings.* cannot be read \(No such file"):
        backend.whole(MicroBatch(0, 0), tiny_batch((3, 5)), train=False)


def test_files_are_closed_with_the_backend(base):
    backend = load(base)
    file = os.fspath(base.files["embeddings"])
    mapped = open_files().count(file)
    for index in range(3):
        backend.whole(MicroBatch(0, index), tiny_batch((3, 5)), train=False)
        assert open_files().count(file) == mapped + 1
    del backend
    gc.collect()
    assert file not in open_files()


def open_files() -> list[str]:
    """Return the files that this process has open, each as often as it has, mapped ones too."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def test_an_adapter_where_no_graph_adapts_is_refused(base):
    backend = load(base)
    before = backend.adapters()
    pair = LoraPair(np.ones((2, 32)), np.ones((32, 2)), 1.0)
    for name in ("transformer.h.0.ln_1", "transformer.h.7.attn.c_attn", "lm_head"):
        with pytest.raises(ProtocolError, match=f"{name} is no linear module held here"):
            backend.set_adapters({name: ModuleAdapter(pair)}, fold=False)
    assert backend.adapters() == before


def child(folder, *arguments: str) -> dict[str, object]:
    """Run `onnx_child` on what was written to ``folder``; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.onnx_child", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_process_that_trains_imports_nothing_heavy(base, tmp_path):
    onnx_child.write(tmp_path, base)
    found = child(tmp_path)
    assert found["losses"] == onnx_child.train(OnnxBackend("cpu", threads=1), base)
    assert not {"torch", "transformers", "peft", "onnx", "onnxscript"} & set(found["modules"])
    assert "onnxruntime" in found["modules"]


@pytest.mark.parametrize(
    ("spare_bytes", "cause"),
    [(10_000_000, "Unable to allocate"), (300_000_000, "while running .* node")],
    ids=["in numpy", "in onnxruntime"],
)
def test_a_full_memory_says_what_to_lower(spare_bytes, cause, base, tmp_path):
    """Memory is short for real: the kernel grants the child no more."""
    onnx_child.write(tmp_path, base)
    kind, text = child(tmp_path, "--starved-at", str(spare_bytes))["error"]
    assert kind == "MemoryFullError"
    assert text.count("this device is out of memory: lower plan.micro_batch") == 1
    assert re.search(cause, text)
