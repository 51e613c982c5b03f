"""Cutting a smaller graph out of an ONNX model: from some outputs back to what is given."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx
from onnx import helper


def cut(
    model: onnx.ModelProto, outputs: Sequence[str], *, given: Collection[str] = ()
) -> onnx.ModelProto:
    """Return the part of ``model`` that computes ``outputs``.

    ``given``: outputs of the model that become inputs where they are needed, instead of being
    computed again.
    """
    graph = model.graph
    nodes, reached = _needed(graph, outputs, given)
    info = {value.name: value for value in (*graph.input, *graph.output)}
    inputs = [value.name for value in graph.input] + list(given)
    part = helper.make_graph(
        nodes,
        graph.name,
        [info[name] for name in inputs if name in reached],
        [info[name] for name in outputs],
        initializer=[value for value in graph.initializer if value.name in reached],
    )
    return _bare(
        helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    )


def read_sizes_from(model: onnx.ModelProto, *, instead_of: str, name: str) -> None:
    """Let whatever asks for the shape of input ``instead_of`` ask input ``name``, in place.

    They have the same shape, but not every part of the model has both.
    """
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] == instead_of:
            node.input[0] = name


def _needed(
    graph: onnx.GraphProto, outputs: Sequence[str], given: Collection[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """Return the nodes, in order, and the names of all inputs and constants they start from."""
    maker = {name: node for node in graph.node for name in node.output}
    wanted: set[int] = set()
    seen: set[str] = set()
    open_ = list(outputs)
    while open_:
        name = open_.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        node = None if name in given else maker.get(name)
        if node is not None and id(node) not in wanted:
            wanted.add(id(node))
            open_ += node.input
    return [node for node in graph.node if id(node) in wanted], seen


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what only people who debug an exporter read: it is most of a small graph's bytes."""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    return model
