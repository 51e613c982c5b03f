"""All graphs of a run, as ONNX files without weights."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from coordinator.graphs.blocks import block as traced_block
from coordinator.graphs.cutting import cut, read_sizes_from
from coordinator.graphs.ends import embeddings, head
from coordinator.graphs.model_to_trace import ModelToTrace
from coordinator.graphs.spec import GraphSpec
from coordinator.graphs.tracing import Traceable, to_onnx
from shared.errors import HsplitError, ModelError
from shared.graphs import (
    EMBEDDINGS,
    HEAD,
    LOSS,
    Direction,
    adds_to_tokens,
    graph_name,
)

OPSET = 20
"""With the file format that goes with it (IR 10): what onnxruntime 1.18 and later read."""


def export_graphs(spec: GraphSpec) -> dict[str, bytes]:
    """Return every graph that a device may need in a run, by name; see `shared.graphs`.

    Takes some 15 s for each kind of block, and for a head.

    Raises:
        ModelError: the family is not supported, or what this model does cannot be exported.
        PlanError: a target module does not exist.
    """
    model = ModelToTrace(spec)
    architecture = model.architecture
    graphs: dict[str, onnx.ModelProto] = {}
    for kind, block in spec.first_of_kinds().items():
        whole = _exported(traced_block(model, block), f"block {block}")
        graphs |= {graph_name(kind, d): part for d, part in _parts(whole).items()}
    if adds_to_tokens(architecture.family):
        graphs[EMBEDDINGS] = cut(_exported(embeddings(model), "the embeddings"), ["output"])
    if spec.training.labels == "device":
        whole = _exported(head(model), "the head")
        outputs = _outputs(whole)
        graphs[HEAD] = cut(whole, outputs)
        graphs[LOSS] = cut(whole, [name for name in outputs if not name.startswith("gradient.")])
    return {name: graph.SerializeToString(deterministic=True) for name, graph in graphs.items()}


def _exported(function: Traceable, what: str) -> onnx.ModelProto:
    try:
        return to_onnx(function, opset=OPSET)
    except HsplitError:
        raise
    except Exception as error:  # torch raises of every kind where it cannot follow a module
        raise ModelError(
            f"{what} of this model cannot be exported to ONNX ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:300] if str(error) else ''}): devices with the onnx "
            "backend cannot take part in training it; install hsplit[torch] there"
        ) from error


def _parts(whole: onnx.ModelProto) -> Mapping[Direction, onnx.ModelProto]:
    """Cut a block into what runs forward and what runs backward.

    The backward pass starts from what came out of the frozen linear modules, and computes all
    else that it needs of the forward pass again: norms, activations, attention. So no product
    with a base weight is done twice, and less is kept than torch would keep.
    """
    read_sizes_from(whole, instead_of="gradient", name="hidden")
    outputs = _outputs(whole)
    kept = [name for name in outputs if name.startswith("kept.")]
    factors = [name for name in outputs if name.startswith(("gradient.a.", "gradient.b."))]
    measured = [name for name in outputs if name.startswith(("input.", "gradient.kept."))]
    backward = cut(whole, ["gradient.hidden", *factors], given=kept)
    probe = cut(whole, ["gradient.hidden", *measured], given=kept)
    needed = {value.name for part in (backward, probe) for value in part.graph.input}
    return {
        "forward": cut(whole, ["output", *(name for name in kept if name in needed)]),
        "backward": backward,
        "lowest": cut(whole, factors, given=kept),
        "probe": probe,
    }


def _outputs(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.output]
