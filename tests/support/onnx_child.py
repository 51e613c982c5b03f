"""Training on a device without torch, in a process that imports nothing else.

``python -m tests.support.onnx_child FOLDER`` trains what `prepare` wrote there and prints JSON: the
losses, and the modules that were imported. With ``--starved-at BYTES`` a large
micro-batch follows, with so much address space beyond what there is, and its error is printed.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np

from edge_agent.backends.base import Backend, FrontBase, MicroBatch, TokenBatch
from edge_agent.backends.onnx_backend import OnnxBackend
from shared.adapters import LoraPair, ModuleAdapter
from shared.architecture import ModelArchitecture
from shared.errors import HsplitError
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

RANK = 4
LORA = LoraTerms(r=RANK)
TRAINING = TrainingTerms(wire_dtype="float32", max_length=16)
OPTIMIZER = OptimizerTerms(learning_rate=3e-3, schedule="constant")


def write(folder: Path, base: FrontBase) -> None:
    """Write what the child loads."""
    described = {
        "config_json": base.config_json,
        "files": {name: str(file) for name, file in base.files.items()},
        "graphs": {name: str(file) for name, file in base.graphs.items()},
        "split_layer": base.split_layer,
    }
    (folder / "base.json").write_text(json.dumps(described))


def train(backend: Backend, base: FrontBase, *, steps: int = 3) -> list[float]:
    """Train the whole model on random words; return the losses."""
    backend.load(
        base, device_id=DeviceId("nano"), training=TRAINING, lora=LORA, optimizer=OPTIMIZER
    )
    architecture = ModelArchitecture.from_json(base.config_json, TRAINING)
    adapters = {}
    for block in range(base.split_layer):
        for inside, (inputs, outputs) in architecture.linears.items():
            random = np.random.default_rng(block)
            a_RI = random.standard_normal((RANK, inputs)).astype(np.float32) / 8
            pair = LoraPair(a_RI, np.zeros((outputs, RANK), np.float32), 2.0)
            adapters[f"{architecture.block_path(block)}.{inside}"] = ModuleAdapter(pair)
    backend.set_adapters(adapters, fold=False)
    losses = []
    for step in range(steps):
        losses.append(backend.whole(MicroBatch(step, 0), words((9, 4, 12)), train=True))
        backend.step(step, target_tokens=25)
    return losses


def words(lengths: tuple[int, ...]) -> TokenBatch:
    """Return sequences of these lengths, in which every word predicts the next."""
    tokens = np.random.default_rng(0).integers(0, 100, sum(lengths) + 1, dtype=np.int32)
    return TokenBatch(tokens[:-1], tokens[1:], lengths)


def main() -> None:
    """Do as told."""
    folder = Path(sys.argv[1])
    told = json.loads((folder / "base.json").read_text())
    paths = {what: {n: Path(f) for n, f in told[what].items()} for what in ("files", "graphs")}
    base = FrontBase(told["config_json"], paths["files"], told["split_layer"], paths["graphs"])
    backend = OnnxBackend("cpu", threads=1)
    answer: dict[str, object] = {"losses": train(backend, base)}
    if sys.argv[2:3] == ["--starved-at"]:
        answer = {"error": starve(backend, int(sys.argv[3]))}
    sys.stdout.write(json.dumps({**answer, "modules": [*sys.modules]}))


def starve(backend: Backend, spare_bytes: int) -> list[str]:
    """Return the type and text of what a batch that needs too much memory ends in."""
    batch = words((16,) * 20_000)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used_bytes + spare_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        backend.whole(MicroBatch(9, 0), batch, train=True)
    except HsplitError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


if __name__ == "__main__":
    main()
