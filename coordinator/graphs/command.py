"""``hsplit-coordinator graphs``: what devices without torch compute with, apart from any run."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.graphs.library import GraphLibrary, graph_cache
from coordinator.graphs.spec import GraphSpec
from coordinator.graphs.stored import StoredGraphs
from coordinator.model_folder import find_model, read_config
from shared.architecture import ModelArchitecture
from shared.atomic import replace_file
from shared.clock import Clock
from shared.errors import PlanError
from shared.terms import LabelMode, LoraTerms, TrainingChoices

LOOK_EVERY_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which graphs: of a model, by folder or hub name, under some of a run's terms.

    ``labels`` server: without those of a head. ``target_modules``: none is the family's default.
    """

    model: str
    labels: LabelMode = "device"
    target_modules: tuple[str, ...] = ()


def write(wanted: Wanted, folder: Path, clock: Clock) -> str:
    """Write every graph as ``<name>.onnx``, and say in a line what was written.

    They come from the user's cache, as those of runs do, or are exported into it first, which
    takes half a minute to a few minutes.

    Raises:
        ModelError: there is no such model, or its architecture is not supported.
        PlanError: it cannot be exported, or a target matches no module of it.
        StorageError: ``folder`` cannot be written.
    """
    graphs = _found_or_exported(_spec(wanted), clock)
    for piece in graphs.pieces:
        content = graphs.read(piece.sha256, offset=0, length=piece.size_bytes)
        replace_file(folder / f"{piece.name}.onnx", bytes(content), durable=False)
    size_bytes = sum(piece.size_bytes for piece in graphs.pieces)
    return f"{len(graphs.pieces)} graphs of {size_bytes / 1e3:.0f} kB in {folder}"


def _spec(wanted: Wanted) -> GraphSpec:
    found = find_model(wanted.model, setting="MODEL", files=("config.json",))
    config_json = read_config(found)
    architecture = ModelArchitecture.from_json(config_json)
    spec = GraphSpec(
        config_json=config_json,
        training=TrainingChoices(
            task=architecture.task,
            # An encoder can only classify; graphs of another number of classes are others.
            classes=tuple(str(number) for number in range(architecture.class_count)),
            labels=wanted.labels,
        ),
        lora=LoraTerms(target_modules=wanted.target_modules),
    )
    spec.sites()  # a wrong target is an error before anything is exported
    return spec


def _found_or_exported(spec: GraphSpec, clock: Clock) -> StoredGraphs:
    with contextlib.closing(GraphLibrary(spec, graph_cache(), clock)) as library:
        graphs: StoredGraphs | PlanError | None = library.want()
        while graphs is None:
            time.sleep(LOOK_EVERY_S)
            graphs = library.poll()
    if isinstance(graphs, PlanError):
        raise graphs
    return graphs
