"""Opening graphs: which device computes, and what is said where one cannot be opened."""

from __future__ import annotations

import logging

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edge_agent.backends.onnx_engine import CPU, PROVIDERS, Engine
from shared.errors import ConfigError, ModelError


def doubling(folder, *, opset=20, ir_version=10):
    """Write a graph: double = x + x."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in ("x", "double"))
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["double"])], "g", [x], [y])
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    file = folder / "g.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def doubled(engine, graph):
    values = {"x": engine.put(np.array([1.0, 2.0], np.float32))}
    return graph.run(values)["double"].numpy().tolist()


def test_a_graph_runs_on_the_cpu_where_there_is_no_gpu(tmp_path):
    engine = Engine(threads=1)
    assert engine.provider == CPU
    assert not engine.is_gpu
    assert doubled(engine, engine.open("g", doubling(tmp_path))) == [2.0, 4.0]


def test_what_is_put_on_the_cpu_is_not_copied():
    array = np.zeros(3, np.float32)
    value = Engine("cpu", threads=1).put(array)
    array[1] = 5.0
    assert value.numpy().tolist() == [0.0, 5.0, 0.0]


@pytest.mark.parametrize("empty", [(0, 4), (4, 0), ()])
def test_values_of_no_size_and_of_no_dimension_keep_their_shape(empty):
    assert list(Engine("cpu", threads=1).put(np.zeros(empty, np.float32)).shape()) == list(empty)


@pytest.mark.parametrize("too_new", [{"opset": 99}, {"ir_version": 99}])
def test_a_graph_of_a_later_version_says_what_to_upgrade(too_new, tmp_path):
    with pytest.raises(ModelError, match=r"graph.x.*cannot open.*pip install --upgrade onnxruntim"):
        Engine("cpu", threads=1).open("graph.x", doubling(tmp_path, **too_new))


@pytest.mark.parametrize("content", [b"", b"these are no graphs\n" * 9, None])
def test_a_file_that_is_no_graph_is_refused(content, tmp_path):
    file = doubling(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ModelError, match="graph.x: onnxruntime"):
        Engine("cpu", threads=1).open("graph.x", file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="graph.x"):
        Engine("cpu", threads=1).open("graph.x", tmp_path / "none.onnx")


@pytest.fixture
def cpu_only(monkeypatch):
    """This machine's onnxruntime, but for GPUs that it may have."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt", "abacus"])
def test_a_device_that_is_not_there_is_refused_by_its_name(device, cpu_only):
    with pytest.raises(
        ConfigError, match=rf"device {device.partition(':')[0]} .*offers cpu; a GPU"
    ):
        Engine(device)


@pytest.fixture
def claims_cuda(monkeypatch):
    """An onnxruntime that says it has CUDA, and does not load it: drivers are missing."""
    if PROVIDERS["cuda"] in ort.get_available_providers():
        pytest.skip("there is a GPU here, which does load")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDERS["cuda"], CPU])


@pytest.mark.filterwarnings("ignore:Specified provider")  # onnxruntime's own, for it did not lie
@pytest.mark.usefixtures("claims_cuda")
def test_a_gpu_that_does_not_load_is_warned_of_once_and_the_cpu_computes(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    engine = Engine(threads=1)
    assert engine.is_gpu
    engine.load_provider()
    graphs = [engine.open(name, doubling(tmp_path)) for name in ("g", "h")]
    assert [doubled(engine, graph) for graph in graphs] == [[2.0, 4.0]] * 2
    assert (engine.provider, engine.is_gpu) == (CPU, False)
    (record,) = caplog.records
    assert "CUDAExecutionProvider does not load: computing on the CPU" in record.getMessage()


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.usefixtures("claims_cuda")
def test_a_gpu_that_fails_after_it_loaded_is_no_reason_to_go_on_without_it(tmp_path):
    """What is on it already could not be used from the CPU."""
    with pytest.raises(ConfigError, match="device cuda: its CUDAExec.*check the driver"):
        Engine().open("g", doubling(tmp_path))


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.usefixtures("claims_cuda")
def test_a_gpu_that_was_asked_for_and_does_not_load_is_refused(tmp_path, caplog):
    with pytest.raises(
        ConfigError, match="device cuda: its CUDAExec.*check the driver.*device: cpu"
    ):
        Engine("cuda").load_provider()
    assert not caplog.records
