"""``python -m tests.testbed.agent_child``: one backend in a process of its own, on command.

Reads a JSON object of its work from the first line of stdin, then a word a line, and answers each
line with a JSON object. Imports nothing but what an agent has, so that it runs in an environment
without torch.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def memory() -> dict[str, int]:
    """Return what the process holds now and held at most, in bytes."""
    found = dict(
        re.findall(r"^(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    )
    return {name: int(value) * 1024 for name, value in found.items()}


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def main() -> None:
    started = time.perf_counter()
    work = json.loads(sys.stdin.readline())
    # What an agent imports, and then the backend that it was told to take.
    import edge_agent.program  # noqa: F401
    from edge_agent.backends import open_backend

    backend = open_backend(work["backend"], device="cpu", threads=work["threads"])
    say(event="started", seconds=time.perf_counter() - started, **memory())
    run(work, backend)


def run(work: dict[str, Any], backend: Any) -> None:
    import numpy as np

    from edge_agent.backends.base import FrontBase, MicroBatch, TokenBatch
    from shared.adapters import LoraPair, ModuleAdapter
    from shared.architecture import ModelArchitecture
    from shared.protocol.messages import DeviceId
    from shared.protocol.tensors import pack
    from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

    random = np.random.default_rng(0)
    lora = LoraTerms(r=work["rank"], target_modules=tuple(work["targets"]))
    training = TrainingTerms(
        labels=work["labels"],
        wire_dtype="float32",
        max_length=work["length"],
        int8_blocks=work.get("int8_blocks", 0),
    )
    architecture = ModelArchitecture.from_json(work["config_json"], training)
    files = {name: Path(file) for name, file in work["files"].items()}
    graphs = {name: Path(file) for name, file in work["graphs"].items()}
    split_layer = work["split_layer"]
    began = time.perf_counter()
    backend.load(
        FrontBase(work["config_json"], files, split_layer, graphs),
        device_id=DeviceId("bench"),
        training=training,
        lora=lora,
        optimizer=OptimizerTerms(),
    )
    adapters = {}
    for name, rank in architecture.target_modules(lora, blocks=range(split_layer)).items():
        inputs, outputs = architecture.features(name)
        a_RI = 0.02 * random.standard_normal((rank, inputs)).astype(np.float32)
        b_OR = 0.02 * random.standard_normal((outputs, rank)).astype(np.float32)
        adapters[name] = ModuleAdapter(LoraPair(a_RI, b_OR, lora.alpha_of(name) / rank))
    backend.set_adapters(adapters, fold=False)
    say(event="loaded", seconds=time.perf_counter() - began, **memory())

    tokens = work["batch"] * work["length"]
    ids = random.integers(0, architecture.vocab_size, tokens, dtype=np.int32)
    batch = TokenBatch(ids, np.roll(ids, -1), (work["length"],) * work["batch"])
    rows = random.standard_normal((tokens, architecture.hidden_size)).astype(np.float32)
    gradient = pack(0.01 * rows)
    for step, word in enumerate(sys.stdin):
        key = MicroBatch(step, 0)
        began = time.perf_counter()
        hidden = backend.forward(key, batch, train=True)
        middle = time.perf_counter()
        head = middle
        if word.strip() == "head":
            _, gradient = backend.head(key, hidden, train=True)
            head = time.perf_counter()
        backend.backward(key, gradient)
        end = time.perf_counter()
        backend.step(step, target_tokens=tokens)
        say(
            event="step",
            forward_s=middle - began,
            head_s=head - middle,
            backward_s=end - head,
            step_s=time.perf_counter() - end,
            **memory(),
        )


if __name__ == "__main__":
    main()
