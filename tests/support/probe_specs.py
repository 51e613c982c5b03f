"""What a probe of a tiny model is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from edge_agent.probe_spec import ProbeSpec
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.tiny_models import tiny_model


def probe_spec(folder: Path, *, family: str = "gpt2", **changes: Any) -> ProbeSpec:
    """Write a model's pieces to ``folder`` and return a probe of them, micro-batches of 4 x 16."""
    model = tiny_model(family)
    plain = {
        "backend": "torch",
        "device": "cpu",
        "config_json": json.dumps(model.config),
        "files": model.write_pieces(folder),
        "device_id": DeviceId("nano"),
        "training": TrainingTerms(max_length=32),
        "lora": LoraTerms(r=4),
        "optimizer": OptimizerTerms(),
        "micro_batch": 4,
        "length": 16,
    }
    return ProbeSpec(**{**plain, **changes})


def first_blocks(spec: ProbeSpec, count: int) -> ProbeSpec:
    """Return the spec with the first ``count`` blocks alone, as a device fetches them."""
    held = {f"block.{block}" for block in range(count)}
    files = {n: f for n, f in spec.files.items() if not n.startswith("block.") or n in held}
    return dataclasses.replace(spec, files=files)
