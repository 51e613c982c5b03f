"""Weights in 8 bits against float32: held-out perplexity, memory, bytes to fetch, time of a step.

Perplexity: the demo's base learns E2E on one device that holds all of it, which by the first law is
what a split fleet computes; ``--rounded`` says of how many blocks the weights are in 8 bits. Memory
and time: fronts of a GPT-2 of the small size with random weights, without torch, each in a
process of its own; they take their steps in turns, with the same threads, because the machine is
noisy.

    make bench-int8                BENCH_ARGS="--threads 2 --steps 200"
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from coordinator import demo
from coordinator.model_store import ModelStore
from edge_agent.backends.base import FrontBase, MicroBatch
from edge_agent.backends.torch_backend import TorchBackend
from edge_agent.dataset import Dataset
from edge_agent.vocabulary import Vocabulary
from shared.adapters import LoraPair, ModuleAdapter
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, OptimizerTerms, TrainingChoices, TrainingTerms
from tests.support.graph_files import graph_files
from tests.support.split_system import tokens_of
from tests.testbed.bench_agents import Child
from tests.testbed.bench_report import write_report
from tests.testbed.joined_text import joined

DEVICE = DeviceId("bench")
TARGETS = ("c_attn", "c_proj", "c_fc")
RANK, MAX_LENGTH, BATCH, EVALUATE_BATCH = 8, 128, 8, 24
MIB = 1 << 20
SHAPES = {"4 x 256 tokens": (4, 256), "1 x 32 tokens": (1, 32)}
"""What a step is timed with: an ordinary micro-batch, and one too small to hide the widening."""


# --- perplexity ---------------------------------------------------------------------------------


def pieces_of(store: ModelStore, folder: Path) -> dict[str, Path]:
    """Write all pieces as a device would get them; return the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for piece in store.describe().pieces:
        files[piece.name] = folder / piece.name
        content = store.read(piece.sha256, offset=0, length=piece.size_bytes)
        files[piece.name].write_bytes(content)
    return files


class Learner:
    """The demo's base and data on one device that holds all blocks."""

    def __init__(self, folder: Path, *, int8_blocks: int, steps: int, seed: int) -> None:
        base = demo.base_folder()
        training = TrainingTerms(
            max_length=MAX_LENGTH, seed=seed, total_steps=steps, int8_blocks=int8_blocks
        )
        store = ModelStore.open(str(base), cache_folder=folder / "store", training=training)
        blocks = store.architecture.block_count
        vocabulary = Vocabulary(base / "tokenizer.json", store.describe())
        shards = demo.shards()
        self._data = Dataset(
            training=joined(
                vocabulary, [shard.training for shard in shards], max_length=MAX_LENGTH
            ),
            held_out=joined(
                vocabulary, [shard.held_out for shard in shards], max_length=MAX_LENGTH
            ),
            seed=seed,
            device_id=DEVICE,
        )
        lora = LoraTerms(r=RANK, target_modules=TARGETS)
        self._backend = TorchBackend("cpu", threads=1)
        files = pieces_of(store, folder / f"int8-{int8_blocks}")
        names = store.architecture.front_pieces(blocks, head_on_device=True)
        self._backend.load(
            FrontBase(store.describe().config_json, {name: files[name] for name in names}, blocks),
            device_id=DEVICE,
            training=training,
            lora=lora,
            optimizer=OptimizerTerms(learning_rate=5e-3, warmup_steps=min(10, steps - 1)),
        )
        random = np.random.default_rng(seed)
        adapters = {}
        for name, rank in store.architecture.target_modules(lora, blocks=range(blocks)).items():
            inputs, outputs = store.architecture.features(name)
            a_RI = random.uniform(-1, 1, (rank, inputs)).astype(np.float32) / np.sqrt(inputs)
            b_OR = np.zeros((outputs, rank), dtype=np.float32)
            pair = LoraPair(a_RI.astype(np.float32), b_OR, lora.alpha_of(name) / rank)
            adapters[name] = ModuleAdapter(pair)
        self._backend.set_adapters(adapters, fold=False)

    def learn(self, steps: int) -> None:
        for step in range(steps):
            batches = self._data.micro_batches(step * BATCH, batch=BATCH, micro_batch=BATCH)
            for index, batch in enumerate(batches):
                self._backend.whole(MicroBatch(step, index), batch, train=True)
            self._backend.step(step, target_tokens=tokens_of(batches))

    def perplexity(self) -> float:
        batches = self._data.evaluation_batches(EVALUATE_BATCH)
        nats = [
            self._backend.whole(MicroBatch(0, index), batch, train=False)
            for index, batch in enumerate(batches)
        ]
        return math.exp(sum(nats) / tokens_of(batches))


def perplexities(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each number of blocks and each seed."""
    rows = []
    for seed in range(options.seeds):
        for blocks in options.rounded:
            learner = Learner(folder, int8_blocks=blocks, steps=options.steps, seed=seed)
            before = learner.perplexity()
            learner.learn(options.steps)
            row = {"int8_blocks": blocks, "seed": seed, "before": before}
            rows.append({**row, "after": learner.perplexity()})
            print(f"  {blocks} of 6 blocks, seed {seed}: {before:.3f} -> {rows[-1]['after']:.4f}")
    return rows


# --- memory and time ----------------------------------------------------------------------------


class Fronts:
    """Two agents without torch: one holds its front in float32, the other in 8 bits."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        base = folder / "gpt2-small"
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_layer=options.split_layer)
        transformers.GPT2LMHeadModel(config).save_pretrained(base)
        shutil.copy(demo.base_folder() / "tokenizer.json", base)
        lora = LoraTerms(r=RANK, target_modules=TARGETS)
        self._works: dict[str, dict[str, Any]] = {}
        self.fetched: dict[str, int] = {}
        for name, blocks in {"float32": 0, "int8": options.split_layer}.items():
            training = TrainingChoices(labels="server", int8_blocks=blocks)
            store = ModelStore.open(str(base), cache_folder=folder / "store", training=training)
            files = pieces_of(store, folder / name)
            own = ["embeddings", *(f"block.{j}" for j in range(options.split_layer))]
            self.fetched[name] = sum(files[one].stat().st_size for one in own[1:])
            config_json = store.describe().config_json
            graphs = graph_files(json.loads(config_json), lora=lora, training=training)
            self._works[name] = {
                "config_json": config_json,
                "files": {one: str(files[one]) for one in own},
                "graphs": {one: str(file) for one, file in graphs.items()},
                "threads": options.threads,
                "rank": RANK,
                "targets": TARGETS,
                "split_layer": options.split_layer,
                "labels": "server",
                "int8_blocks": blocks,
            }

    def steps(self, batch: int, length: int) -> dict[str, list[dict[str, Any]]]:
        """Return what each said of its steps, taken in turns; the first two are left out."""
        children = {
            name: Child.start(
                "onnx", {**work, "batch": batch, "length": length}, Path(sys.executable)
            )
            for name, work in self._works.items()
        }
        for child in children.values():
            child.hear(), child.hear()
        for _ in range(self._options.timed + 2):
            for child in children.values():
                child.tell("step")
                child.hear()
        for child in children.values():
            child.end()
        return {name: child.said[1:2] + child.said[4:] for name, child in children.items()}


def fronts(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, float]]:
    """Return rows of (float32, int8)."""
    both = Fronts(options, folder)
    rows = {"blocks to fetch, MiB": _pair(both.fetched, MIB)}
    for shape, (batch, length) in SHAPES.items():
        said = both.steps(batch, length)
        for what, name in (("resident", "VmRSS"), ("not from files", "RssAnon")):
            held = {n: statistics.median(one[name] for one in own[1:]) for n, own in said.items()}
            rows[f"{shape}: {what}, MiB"] = _pair(held, MIB)
        peak = {n: own[-1]["VmHWM"] for n, own in said.items()}
        rows[f"{shape}: peak, MiB"] = _pair(peak, MIB)
        for part in ("forward_s", "backward_s"):
            took = {n: statistics.median(one[part] for one in own[1:]) for n, own in said.items()}
            rows[f"{shape}: {part[:-2]}, ms"] = _pair(took, 1e-3)
        seconds = {
            n: [o["forward_s"] + o["backward_s"] for o in own[1:]] for n, own in said.items()
        }
        ratios = [b / a for a, b in zip(seconds["float32"], seconds["int8"], strict=True)]
        rows[f"{shape}: step, as a ratio"] = (1.0, statistics.median(ratios))
    return rows


def _pair(found: Mapping[str, float], unit: float) -> tuple[float, float]:
    return found["float32"] / unit, found["int8"] / unit


def main() -> None:
    """Measure, print, write build/bench/int8.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each agent")
    parser.add_argument("--steps", type=int, default=100, help="steps of learning")
    parser.add_argument("--seeds", type=int, default=3, help="of data and adapters")
    parser.add_argument("--rounded", type=int, nargs="+", default=[0, 3, 6], help="blocks, of 6")
    parser.add_argument("--split-layer", type=int, default=6, help="blocks that the agents hold")
    parser.add_argument("--timed", type=int, default=10, help="steps that are timed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learnt = perplexities(options, folder)
        rows = fronts(options, folder)
    print(f"\n{'':38}{'float32':>10}{'int8':>10}{'int8 / float32':>16}")
    for row, (one, other) in rows.items():
        print(f"{row:38}{one:10.1f}{other:10.1f}{other / one:16.3f}")
    write_report("int8", {**vars(options), "perplexity": learnt, "rows": rows})


if __name__ == "__main__":
    main()
