"""A run small enough for a test: the shipped base, two unequal devices, twelve steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from coordinator import demo

BASE = demo.base_folder()
BLOCKS = 6
LINES, HELD_OUT_LINES = 40, 5
ROUNDS, STEPS = 3, 4
SPLIT_LAYERS = {"workstation": 4, "nano": 1}
RANKS = {"workstation": 8, "nano": 4}


@dataclass(frozen=True)
class Text:
    """One device's files."""

    data: Path
    held_out: Path

    def flags(self) -> list[str]:
        """Return the agent's flags for the held-out part and for tests' small machines."""
        return ["--evaluation-data", str(self.held_out), "--threads", "1"]


def write_text(folder: Path) -> dict[str, Text]:
    """Write a short shard for each device."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for shard in demo.shards():
        if shard.device in SPLIT_LAYERS:
            text = Text(folder / f"{shard.device}.jsonl", folder / f"{shard.device}-held-out.jsonl")
            text.data.write_text(_head(shard.training, LINES))
            text.held_out.write_text(_head(shard.held_out, HELD_OUT_LINES))
            texts[shard.device] = text
    return texts


def _head(path: Path, count: int) -> str:
    return "".join(path.read_text().splitlines(keepends=True)[:count])


def settings(**changes: Any) -> dict[str, Any]:
    """Return a ``run.yaml`` for both devices; ``changes`` replace whole sections."""
    plan = {
        "batch": 6,
        "micro_batch": 3,
        "devices": {
            "workstation": {"split_layer": 4, "r": 8, "lora_alpha": 16},
            "nano": {"split_layer": 1, "r": 4, "lora_alpha": 8, "batch": 4, "micro_batch": 2},
        },
    }
    return {
        "model": {"name": str(BASE)},
        "devices": {"min": 2, "expected": 2},
        "plan": plan,
        "rounds": {"count": ROUNDS, "steps": STEPS},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 2},
        "training": {"max_length": 128, "wire_dtype": "float32"},
        "threads": 1,
        **changes,
    }


def held_out_loss(model: torch.nn.Module, files: Iterable[Path]) -> float:
    """Return the plain model's loss per target token (completion and end of text), by hand."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    nats, targets = 0.0, 0
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            prompt, completion = tokenizer(row["prompt"])["input_ids"], row["completion"]
            ids = [*prompt, *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float()
            expected = torch.tensor(ids[len(prompt) :])
            nats += float(torch.nn.functional.cross_entropy(logits, expected, reduction="sum"))
            targets += len(expected)
    return nats / targets


def plain_model(folder: Path = BASE) -> transformers.PreTrainedModel:
    """Return the Hugging Face model of a folder, in float32."""
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval()


def updates(adapter: Path) -> Mapping[str, np.ndarray]:
    """Return module → B A of an exported adapter, whose scalings are all 1."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    return {
        name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names
    }


def distance(one: Path, other: Path) -> float:
    """Return the largest relative difference between two adapters, module by module."""
    ours, theirs = updates(one), updates(other)
    assert ours.keys() == theirs.keys()
    assert ours
    return max(
        float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]))
        for name in ours
    )
