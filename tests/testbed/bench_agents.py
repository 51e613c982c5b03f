"""An agent with torch and one without it, side by side: start-up, size, memory, time of a step.

Each backend runs in a process of its own, the light one in an environment that holds nothing but
`hsplit[onnx]`; they take their steps in turns, with the same threads, because the machine is
noisy. The front is that of a GPT-2 of the small size, with random weights.

    make bench-agents              BENCH_ARGS="--threads 2 --steps 20"
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from coordinator.graphs.exporting import Export
from coordinator.graphs.spec import GraphSpec
from shared.architecture import ModelArchitecture
from shared.clock import SystemClock
from shared.terms import LoraTerms, TrainingChoices
from tests.support import light_environment
from tests.support.graph_files import graph_files
from tests.support.installed_sizes import closure_bytes
from tests.testbed.bench_report import write_report
from tests.testbed.system import ROOT

TARGETS = ("c_attn", "c_proj", "c_fc")
RANK = 8
BATCH, LENGTH = 4, 256
BACKENDS = ("torch", "onnx")
AIMS = {"start-up": 1 / 3, "installed": 1 / 3, "memory": 1 / 2, "step": 1.1}


@dataclass
class Child:
    """One backend in a process of its own."""

    backend: str
    process: subprocess.Popen[str]
    began: float
    said: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, backend: str, work: Mapping[str, Any], python: Path) -> Child:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(python), "-m", "tests.testbed.agent_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        child = cls(backend, process, began)
        child.tell(json.dumps({**work, "backend": backend}))
        return child

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.backend} agent ended with {self.process.wait()}")
        self.said.append(json.loads(line))
        return self.said[-1]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def model(folder: Path, blocks: int) -> tuple[str, dict[str, str]]:
    """Write the pieces of a random GPT-2 with so many blocks; return its config and the files."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=blocks)
    architecture = ModelArchitecture.from_config(config.to_dict())
    pieces: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in transformers.GPT2LMHeadModel(config).state_dict().items():
        piece = architecture.piece_of(name)
        if piece is not None:
            pieces.setdefault(piece, {})[name] = tensor.contiguous()
    files = {}
    for piece, tensors in pieces.items():
        save_file(tensors, folder / f"{piece}.safetensors")
        files[piece] = str(folder / f"{piece}.safetensors")
    return config.to_json_string(), files


class Bench:
    """One model, and children that hold a front of it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        config_json, files = model(folder, blocks=4)
        lora = LoraTerms(r=RANK, target_modules=TARGETS)
        began = time.perf_counter()
        graphs = graph_files(json.loads(config_json), lora=lora)
        print(f"graphs: {time.perf_counter() - began:.1f} s (0 where they were exported before)")
        self._work = {
            "config_json": config_json,
            "files": files,
            "graphs": {name: str(file) for name, file in graphs.items()},
            "threads": options.threads,
            "rank": RANK,
            "targets": TARGETS,
            "batch": BATCH,
            "length": LENGTH,
        }
        self._pythons = {
            "torch": Path(sys.executable),
            "onnx": light_environment.make() / "python",
        }

    def start_up(self) -> dict[str, float]:
        """Return the median seconds from nothing to a backend that could load a part."""
        took: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for repeat in range(self._options.starts + 1):
            for backend in BACKENDS:
                child = self._start(backend, split_layer=1, labels="server")
                child.hear()
                if repeat:  # the first reads from the disk
                    took[backend].append(time.perf_counter() - child.began)
                child.process.kill()
                child.process.wait()
        return {backend: statistics.median(seconds) for backend, seconds in took.items()}

    def steps(self, *, split_layer: int, labels: str) -> dict[str, list[dict[str, Any]]]:
        """Return what each said of its steps, taken in turns; the first two are left out."""
        children = [self._start(b, split_layer=split_layer, labels=labels) for b in BACKENDS]
        for child in children:
            child.hear(), child.hear()
        word = "head" if labels == "device" else "step"
        for _ in range(self._options.steps + 2):
            for child in children:
                child.tell(word)
                child.hear()
        for child in children:
            child.end()
        return {child.backend: child.said[4:] for child in children}

    def _start(self, backend: str, *, split_layer: int, labels: str) -> Child:
        names = ["embeddings", *(f"block.{j}" for j in range(split_layer))]
        names += ["final_norm"] if labels == "device" else []
        files = {name: self._work["files"][name] for name in names}
        work = {**self._work, "files": files, "split_layer": split_layer, "labels": labels}
        return Child.start(backend, work, self._pythons[backend])


def export() -> dict[str, float]:
    """Export the graphs of a 32-block Llama of the 1B class, as a coordinator does; none waits."""
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    )
    spec = GraphSpec(
        config_json=config.to_json_string(), training=TrainingChoices(), lora=LoraTerms(r=RANK)
    )
    with tempfile.TemporaryDirectory() as folder:
        exporting = Export(spec, Path(folder), SystemClock())
        exporting.process.wait()
        ended = exporting.ended()
        assert ended is not None
        assert ended.failure is None, ended
        sizes = [file.stat().st_size for file in Path(folder).glob("*.onnx")]
    return {"seconds": ended.took_s, "graphs": len(sizes), "kilobytes": sum(sizes) / 1e3}


def ratio(said: Mapping[str, list[dict[str, Any]]], *parts: str) -> tuple[float, ...]:
    """Return both medians, and the median ratio of steps taken one after the other."""
    sums = {b: [sum(one[part] for part in parts) for one in said[b]] for b in BACKENDS}
    ratios = [own / other for own, other in zip(sums["onnx"], sums["torch"], strict=True)]
    return (*(statistics.median(sums[b]) for b in BACKENDS), statistics.median(ratios))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        start_up = bench.start_up()
        at_3 = bench.steps(split_layer=3, labels="server")
        at_2 = bench.steps(split_layer=2, labels="server")
        with_head = bench.steps(split_layer=2, labels="device")
    sizes = {"torch": closure_bytes("hsplit", "torch"), "onnx": light_environment.installed_bytes()}
    peak = {b: max(one["VmHWM"] for one in at_2[b]) for b in BACKENDS}
    own = {b: max(one["RssAnon"] for one in at_2[b]) for b in BACKENDS}
    peak_head = {b: max(one["VmHWM"] for one in with_head[b]) for b in BACKENDS}
    rows: dict[str, tuple[float, ...]] = {
        "start-up, s": _of(start_up),
        "installed, MB": _of({b: size / 1e6 for b, size in sizes.items()}),
        "memory at k = 2, peak, MB": _of({b: size / 1e6 for b, size in peak.items()}),
        "  of it not from files, MB": _of({b: size / 1e6 for b, size in own.items()}),
        "  with the head, peak, MB": _of({b: size / 1e6 for b, size in peak_head.items()}),
        "step at k = 3, ms": _in_ms(ratio(at_3, "forward_s", "backward_s")),
        "  forward, ms": _in_ms(ratio(at_3, "forward_s")),
        "  backward, ms": _in_ms(ratio(at_3, "backward_s")),
        "  optimizer, ms": _in_ms(ratio(at_3, "step_s")),
        "head and its gradient, ms": _in_ms(ratio(with_head, "head_s")),
    }
    terms = {"threads": options.threads, "batch": BATCH, "length": LENGTH}
    return {"rows": rows, "export": export(), **terms}


def _of(found: Mapping[str, float]) -> tuple[float, ...]:
    return found["torch"], found["onnx"], found["onnx"] / found["torch"]


def _in_ms(found: tuple[float, ...]) -> tuple[float, ...]:
    return found[0] * 1000, found[1] * 1000, found[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--steps", type=int, default=12, help="steps that are measured")
    parser.add_argument("--starts", type=int, default=5, help="starts that are measured")
    found = measure(parser.parse_args())
    print(f"\n{'':30}{'torch':>10}{'onnx':>10}{'onnx / torch':>14}")
    for name, (of_torch, of_onnx, quotient) in found["rows"].items():
        print(f"{name:30}{of_torch:10.2f}{of_onnx:10.2f}{quotient:14.3f}")
    exported = found["export"]
    print(
        f"export of a 32-block model of the 1B class: {exported['seconds']:.0f} s, "
        f"{exported['graphs']} graphs of {exported['kilobytes']:.0f} kB in all, for any split layer"
    )
    print(f"aims: {', '.join(f'{name} {aim:.2f}' for name, aim in AIMS.items())}")
    write_report("agents", {**found, "aims": AIMS})


if __name__ == "__main__":
    main()
