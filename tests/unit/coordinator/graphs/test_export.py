"""What is in exported graphs, and that a config's every oddity is in them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
import transformers

from coordinator.graphs.export import OPSET, export_graphs
from coordinator.graphs.spec import GraphSpec
from edge_agent.backends import open_backend
from edge_agent.backends.base import MicroBatch
from shared.errors import ModelError
from shared.graphs import block_kind, graph_names
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import pack, unpack
from shared.terms import LoraTerms, OptimizerTerms, TrainingChoices, TrainingTerms
from tests.support.closeness import largest_difference, relative
from tests.support.graph_files import ALL_LINEAR, model_graphs
from tests.support.tiny_models import (
    CONFIGS,
    TinyModel,
    fresh_adapters,
    tiny_batch,
    tiny_classifier,
    tiny_model,
)

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

MODELS = {
    "gpt2": tiny_model("gpt2"),
    "llama": tiny_model("llama"),
    "qwen2": tiny_model("qwen2"),
    "bert": tiny_classifier("bert"),
}


@pytest.fixture(params=MODELS)
def model(request) -> TinyModel:
    return MODELS[request.param]


@pytest.fixture
def graphs(model) -> dict[str, onnx.ModelProto]:
    return {name: onnx.load(file) for name, file in model_graphs(model).items()}


def test_all_graphs_that_a_device_may_need_are_exported(model, graphs):
    blocks = range(model.architecture.block_count)
    assert graphs.keys() == set(graph_names(model.config, blocks=blocks, head_on_device=True))


def test_graphs_are_valid_and_of_standard_operators_alone(graphs):
    for name, graph in graphs.items():
        onnx.checker.check_model(graph, full_check=True)
        assert [(one.domain, one.version) for one in graph.opset_import] == [("", OPSET)], name
        assert graph.ir_version == 10, "what onnxruntime 1.18 reads"
        assert {node.domain for node in graph.graph.node} == {""}, name
        assert not graph.functions


def test_no_weight_is_in_a_graph(model, graphs):
    for name, file in model_graphs(model).items():
        assert file.stat().st_size < 100_000, name
        held = [len(one.SerializeToString()) for one in graphs[name].graph.initializer]
        # The smallest weight of these models, a bias of 32 numbers, takes more than half of this.
        assert sum(held) < 2_000, name
    inside = f"{model.architecture.block_path(0)}."
    weights = {name.removeprefix(inside) for name in model.tensors if name.startswith(inside)}
    blocks = [graph for name, graph in graphs.items() if name.startswith("graph.full_attention")]
    inputs = {one.name for graph in blocks for one in graph.graph.input}
    assert {f"weight.{name}" for name in weights} == {n for n in inputs if n.startswith("weight.")}


def test_batch_length_and_ranks_stay_open(graphs):
    for direction in ("forward", "backward", "lowest", "probe"):
        graph = graphs[f"graph.full_attention.{direction}"].graph
        for one in graph.input:
            sizes = [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim]
            kind = one.name.partition(".")[0]
            open_dims = {
                "hidden": (0, 1), "gradient": (0, 1), "a": (0,), "b": (1,), "frozen_a": (0,),
                "frozen_b": (1,), "kept": (0,), "lengths": (0,), "weight": (), "scaling": (),
            }[kind]  # fmt: skip
            assert tuple(i for i, size in enumerate(sizes) if isinstance(size, str)) == open_dims


# --- what a config may ask for ----------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 100.0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
ODD = {
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "activation_function": "tanh",
        "n_layer": 2,
    },
    "llama": {"rope_scaling": LLAMA3, "hidden_act": "relu"},
    "qwen2": {
        **SLIDING,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        "hidden_act": "gelu_pytorch_tanh",
        "num_hidden_layers": 2,
    },
}
KINDS = {"gpt2": 2, "llama": 1, "qwen2": 2}
OPTIMIZER = OptimizerTerms(
    name="sgd", learning_rate=512.0, weight_decay=0.0, schedule="constant", max_grad_norm=0.0
)


def trained(backend, model, folder, *, split_layer=2):
    """Return activations, and adapters that are all gradient after a step."""
    base = model.front_base(folder, split_layer=split_layer, head=False)
    if backend == "onnx":
        base = dataclasses.replace(base, graphs=model_graphs(model, labels="server"))
    lora = LoraTerms(r=4, target_modules=ALL_LINEAR[model.config["model_type"]])
    one = open_backend(backend, device="cpu", threads=1)
    one.load(
        base,
        device_id=DeviceId("nano"),
        training=TrainingTerms(labels="server", wire_dtype="float32", max_length=16),
        lora=lora,
        optimizer=OPTIMIZER,
    )
    held = fresh_adapters(model.architecture, lora, blocks=range(split_layer))
    one.set_adapters(held, fold=False)
    key, batch = MicroBatch(0, 0), tiny_batch((9, 4, 12))
    hidden = unpack(one.forward(key, batch, train=True))
    random = np.random.default_rng(0)
    one.backward(key, pack(random.standard_normal(hidden.shape).astype(np.float32)))
    one.step(0, target_tokens=1)
    return hidden, one.adapters()


@pytest.mark.slow
@pytest.mark.parametrize("family", ODD)
def test_what_a_config_asks_for_is_in_the_graphs(family, tmp_path):
    model = tiny_model(family, **ODD[family])
    kinds = {name for name in model_graphs(model, labels="server") if name.endswith(".forward")}
    assert len(kinds) == KINDS[family]
    light, heavy = (trained(backend, model, tmp_path) for backend in ("onnx", "torch"))
    assert relative(light[0], heavy[0]) <= 1e-6
    assert largest_difference(light[1], heavy[1]) <= 5e-6


SAME_SIZED = [
    (family, oddity)
    for family in ODD
    for oddity in ODD[family]
    # A smaller model is another, and the order of a product no difference to see.
    if oddity not in ("n_layer", "num_hidden_layers", "reorder_and_upcast_attn")
]


@pytest.mark.parametrize(("family", "oddity"), SAME_SIZED)
def test_every_oddity_matters(family, oddity, tmp_path):
    without = {name: value for name, value in ODD[family].items() if name != oddity}
    odd, plain = (
        trained("torch", tiny_model(family, **changes), tmp_path)[0]
        for changes in (ODD[family], without)
    )
    assert relative(odd, plain) > 1e-4


def test_a_config_that_cannot_be_exported_is_refused_with_what_to_do():
    """These frequencies depend on the longest sequence seen so far: no function of its inputs."""
    rope = {"rope_type": "dynamic", "factor": 2.0}
    spec = GraphSpec(
        config_json=json.dumps({**CONFIGS["llama"], "rope_scaling": rope}),
        training=TrainingChoices(labels="server"),
        lora=LoraTerms(target_modules=("q_proj",)),
    )
    with pytest.raises(
        ModelError, match=r"block 0 of this model cannot be exported.*hsplit\[torch"
    ):
        export_graphs(spec)


def test_a_family_that_is_not_supported_is_refused():
    spec = GraphSpec(
        config_json='{"model_type": "bloom"}', training=TrainingChoices(), lora=LoraTerms()
    )
    with pytest.raises(ModelError, match="bloom"):
        export_graphs(spec)


@pytest.mark.parametrize("config", [{}, {"sliding_window": None}, {"use_sliding_window": False}])
@pytest.mark.parametrize("stated", [True, False])
def test_kinds_of_blocks_are_those_of_the_library(stated, config):
    """Whether a file says for each layer how it attends, or Qwen's older way, or nothing."""
    config = {**CONFIGS["qwen2"], **SLIDING, **config}
    parsed = transformers.CONFIG_MAPPING["qwen2"].from_dict(dict(config))
    if stated:
        config["layer_types"] = parsed.layer_types
    kinds = [block_kind(config, block) for block in range(3)]
    assert kinds == parsed.layer_types
