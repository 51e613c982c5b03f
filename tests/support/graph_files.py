"""Graphs of tiny models for tests: exported once, whichever test or process asks first."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import coordinator.graphs
from coordinator.graphs import stored
from coordinator.graphs.export import export_graphs
from coordinator.graphs.library import GraphLibrary
from coordinator.graphs.spec import GraphSpec
from shared.terms import LabelMode, LoraTerms, TrainingChoices
from tests.support.tiny_models import TinyModel

CACHE = Path(__file__).parents[2] / "build" / "test-graphs"
"""Lasts longer than a test, and than a session: an export takes half a minute."""
NOT_OF_THE_EXPORTER = {"command", "exporting", "library", "program", "stored"}
"""Of the files in coordinator/graphs: what keeps graphs, serves them or starts an export."""
ALL_LINEAR = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "dense"),
}
"""Targets that match every linear module of a block, by family."""
ALL_LINEAR = {**ALL_LINEAR, "qwen2": ALL_LINEAR["llama"], "qwen3": ALL_LINEAR["llama"]}
ALL_LINEAR = {**ALL_LINEAR, "roberta": ALL_LINEAR["bert"]}


def graph_files(
    config: Mapping[str, Any], *, lora: LoraTerms, training: TrainingChoices | None = None
) -> dict[str, Path]:
    """Return the graphs' files by name; with the head, whichever side has it."""
    spec = GraphSpec(
        config_json=json.dumps(config), training=training or TrainingChoices(), lora=lora
    )
    key = f"{spec.key[:32]}-{_exporter()}"
    folder = CACHE / key
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            folder.mkdir(exist_ok=True)
            for name, content in export_graphs(spec).items():
                (folder / f"{name}.onnx").write_bytes(content)
            (folder / "complete").touch()
    return {file.stem: file for file in folder.glob("*.onnx")}


def model_graphs(
    model: TinyModel, *, dropout: float = 0.0, labels: LabelMode = "device"
) -> dict[str, Path]:
    """Return the graphs of a tiny model under its task, with sites at all linear modules.

    They serve any targets and ranks. ``labels``: with ``server`` there are none of a head.
    """
    targets = ALL_LINEAR[model.config["model_type"]]
    return graph_files(
        model.config,
        lora=LoraTerms(target_modules=targets, lora_dropout=dropout),
        training=dataclasses.replace(model.training or TrainingChoices(), labels=labels),
    )


def put_in_cache(library: GraphLibrary) -> None:
    """Let a run's library find its graphs, those of a head included, so that none is exported.

    They have sites at all linear modules, so runs of one model share them whatever their targets.
    """
    spec = library._spec
    config = json.loads(spec.config_json)
    lora = LoraTerms(
        target_modules=ALL_LINEAR[config["model_type"]], lora_dropout=spec.lora.lora_dropout
    )
    training = dataclasses.replace(spec.training, labels="device")
    files = graph_files(config, lora=lora, training=training)
    stored.save(library._folder, {name: file.read_bytes() for name, file in files.items()})


def cache_of_programs() -> Path:
    """Return where all coordinators that tests start as programs may keep their graphs."""
    folder = CACHE / f"programs-{_exporter()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _exporter() -> str:
    """Return a hash of the exporter's source, so that no test passes with a former one's graphs."""
    (folder,) = coordinator.graphs.__path__
    content = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.py")):
        if file.stem not in NOT_OF_THE_EXPORTER:
            content.update(file.name.encode() + file.read_bytes())
    return content.hexdigest()[:16]
