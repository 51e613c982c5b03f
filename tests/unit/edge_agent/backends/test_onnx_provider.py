"""What computes is known as soon as the onnx backend is opened, and said.

No build of onnxruntime for a GPU is needed: where one offers a provider that it cannot load, it
computes on the CPU, as this build does when it is asked for a provider that it lacks.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edge_agent.backends import open_backend
from edge_agent.backends.onnx_engine import _TRIAL, Engine
from edge_agent.emulation import Emulation, emulated
from shared.errors import ConfigError

VERSION = f"onnxruntime {ort.__version__}"
ON_THE_CPU = f"{VERSION}, CPUExecutionProvider"
OFFERED = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def offers_gpus(monkeypatch):
    """Let onnxruntime offer what a build for GPUs does."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: OFFERED)


def test_every_backend_says_what_it_computes_with():
    onnx_, torch_ = (open_backend(name, device="cpu", threads=1) for name in ("onnx", "torch"))
    assert onnx_.computes_with == ON_THE_CPU
    assert torch_.computes_with == f"torch {torch.__version__}, cpu"
    assert onnx_.accelerator is None
    assert onnx_.accelerator_memory() is None
    assert emulated(onnx_, Emulation(speed=0.5)).computes_with == ON_THE_CPU


@pytest.mark.usefixtures("offers_gpus")
def test_a_gpu_that_does_not_load_is_no_gpu_before_any_graph_comes(caplog):
    with caplog.at_level(logging.WARNING):
        backend = open_backend("onnx", threads=1)
    (warning,) = (one.getMessage() for one in caplog.records)
    assert warning.startswith("CUDAExecutionProvider does not load (")
    assert warning.endswith("): computing on the CPU instead")
    assert backend.computes_with == ON_THE_CPU
    assert backend.accelerator is None
    assert backend.accelerator_memory() is None


@pytest.mark.usefixtures("offers_gpus")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt", "tensorrt:1"])
def test_what_was_asked_for_by_name_must_load_at_the_start(device):
    with pytest.raises(ConfigError, match=f"on device {device[:4]}.* does not load.*device: cpu"):
        open_backend("onnx", device=device, threads=1)


@pytest.mark.usefixtures("offers_gpus")
@pytest.mark.parametrize(
    ("device", "providers"),
    [
        ("cpu", [("CPUExecutionProvider", {})]),
        ("cuda:2", [("CUDAExecutionProvider", {"device_id": 2}), ("CPUExecutionProvider", {})]),
        (
            "tensorrt:1",
            [
                ("TensorrtExecutionProvider", {"device_id": 1}),
                ("CUDAExecutionProvider", {"device_id": 1}),
                ("CPUExecutionProvider", {}),
            ],
        ),
        (None, [("CUDAExecutionProvider", {"device_id": 0}), ("CPUExecutionProvider", {})]),
    ],
)
def test_a_session_gets_the_provider_and_those_that_stand_in_for_it(device, providers):
    """TensorRT is never among them unasked."""
    engine = Engine(device)
    assert engine._providers() == providers
    gpu = "" if device == "cpu" else f" {providers[0][1]['device_id']}"
    assert str(engine) == f"{VERSION}, {providers[0][0]}{gpu}"


def test_torch_has_no_tensorrt():
    for name in ("torch", "auto"):
        with pytest.raises(ConfigError, match="device tensorrt:1 .*choose backend: onnx"):
            open_backend(name, device="tensorrt:1")


def test_tensorrt_needs_a_build_that_has_it():
    with pytest.raises(ConfigError, match="device tensorrt is not there.*offers cpu"):
        open_backend("onnx", device="tensorrt")


def test_the_trial_is_a_graph_that_gives_back_what_it_gets():
    model = onnx.load_model_from_string(_TRIAL)
    onnx.checker.check_model(model, full_check=True)
    engine = Engine("cpu", threads=1)
    graph = engine.open("a trial", _TRIAL)
    values = graph.run({"x": engine.put(np.array([2.5], np.float32))})
    assert values["y"].numpy() == [2.5]
