"""Graphs of tiny models for tests: exported once, whichever test or process asks first."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.graphs.export import export_graphs
from coordinator.graphs.spec import GraphSpec
from shared.terms import LoraTerms, TrainingChoices

CACHE = Path(__file__).parents[2] / "build" / "test-graphs"
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
    folder = CACHE / spec.key
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{spec.key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            folder.mkdir(exist_ok=True)
            for name, content in export_graphs(spec).items():
                (folder / f"{name}.onnx").write_bytes(content)
            (folder / "complete").touch()
    return {file.stem: file for file in folder.glob("*.onnx")}
