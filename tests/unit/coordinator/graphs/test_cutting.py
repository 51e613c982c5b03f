"""Cutting a smaller graph out of a larger one."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from coordinator.graphs.cutting import cut, read_sizes_from


@pytest.fixture
def whole() -> onnx.ModelProto:
    """sum = x + y; twice = sum * two; both = twice + z; size = shape of z."""
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"], doc_string="line 7 of model.py"),
        helper.make_node("Mul", ["sum", "two"], ["twice"]),
        helper.make_node("Add", ["twice", "z"], ["both"]),
        helper.make_node("Shape", ["z"], ["size"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xyz"]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"])
        for name in ("sum", "twice", "both")
    ]
    outputs.append(helper.make_tensor_value_info("size", TensorProto.INT64, [1]))
    constants = [numpy_helper.from_array(np.array([2.0], np.float32), "two")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def names(values) -> list[str]:
    return [value.name for value in values]


def run(model, **values):
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {n: np.array(v, np.float32) for n, v in values.items()})


def test_a_cut_has_what_its_outputs_need_and_nothing_else(whole):
    part = cut(whole, ["sum"])
    assert names(part.graph.input) == ["x", "y"]
    assert names(part.graph.output) == ["sum"]
    assert not part.graph.initializer
    assert [node.op_type for node in part.graph.node] == ["Add"]
    (found,) = run(part, x=[1, 2], y=[3, 4])
    np.testing.assert_array_equal(found, [4, 6])


def test_what_is_given_is_not_computed_again(whole):
    part = cut(whole, ["both", "twice"], given=["sum"])
    assert names(part.graph.input) == ["z", "sum"]
    assert names(part.graph.output) == ["both", "twice"]
    assert names(part.graph.initializer) == ["two"]
    both, twice = run(part, sum=[5], z=[1])
    assert (both[0], twice[0]) == (11, 10)


def test_what_is_given_and_not_needed_is_no_input(whole):
    part = cut(whole, ["sum"], given=["twice"])
    assert names(part.graph.input) == ["x", "y"]


def test_the_whole_stays_as_it_was_and_the_part_tells_nothing_of_its_making(whole):
    before = names(whole.graph.input)
    part = cut(whole, ["both", "size"])
    assert names(whole.graph.input) == before
    assert part.opset_import == whole.opset_import
    assert part.ir_version == whole.ir_version
    assert not any(node.doc_string for node in part.graph.node)


def test_sizes_are_read_from_the_input_that_every_part_has(whole):
    read_sizes_from(whole, instead_of="z", name="x")
    part = cut(whole, ["size"])
    assert names(part.graph.input) == ["x"]
    (size,) = run(part, x=[1, 2, 3])
    assert size.tolist() == [3]
