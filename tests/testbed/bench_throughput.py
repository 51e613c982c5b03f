"""Tokens per second of split training, divided by those of one process with PEFT.

One device and the coordinator over a loopback mosquitto, against a monolithic PEFT loop on the
same sequences, batch and threads; both in turns in one run, because the machine is noisy. And
the bytes that a step moves, beside the least possible: activations and gradients alone.

    make bench                     BENCH_ARGS="--repeats 5 --threads 2"
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordinator import demo
from tests.testbed.bench_report import write_report
from tests.testbed.system import ROOT, System, broker

BATCH = 8
MAX_LENGTH = 256
HIDDEN = 192
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
TARGETS = ("c_attn", "c_proj", "c_fc")
DEVICE = "bench"
WARM_UP_STEPS = 10
AIMS = {"server": 0.85, "device": 0.75}
AIM_OVERHEAD = 0.02


@dataclass(frozen=True)
class Split:
    """What one split run measured."""

    tokens_per_s: float
    bytes_per_step: float
    least_bytes_per_step: float


def settings(labels: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"name": str(demo.base_folder())},
        "devices": {"min": 1, "wait_s": 0},
        "plan": {
            "split_layer": options.split_layer,
            "batch": BATCH,
            "micro_batch": options.micro_batch,
            "in_flight": options.in_flight,
        },
        "rounds": {"count": 1, "steps": options.steps},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS)},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"labels": labels, "max_length": MAX_LENGTH, "wire_dtype": options.wire_dtype},
        "report_to": [],
        "threads": options.threads,
    }


Row = tuple[list[int], list[int]]
"""Input ids and labels of one sequence."""


def tokens_per_step(steps: int) -> list[int]:
    """Return the input tokens of each step's batch, as the agent takes them."""
    return [sum(len(ids) for ids, _ in rows) for rows in batches(steps)]


def batches(steps: int) -> list[list[Row]]:
    """Return the sequences of each step: what the agent of `DEVICE` trains on."""
    from coordinator.model_store import ModelStore
    from edge_agent.dataset import Dataset
    from edge_agent.records import Records
    from edge_agent.vocabulary import Vocabulary
    from shared.protocol.messages import DeviceId

    base = demo.base_folder()
    with tempfile.TemporaryDirectory() as cache:
        model = ModelStore.open(str(base), cache_folder=Path(cache)).describe()
    records = Records.load(demo.shards()[0].training)
    training = Vocabulary(base / "tokenizer.json", model).tokenise(records, max_length=MAX_LENGTH)
    data = Dataset(training=training, held_out=None, seed=0, device_id=DeviceId(DEVICE))
    found = []
    for step in range(steps):
        (batch,) = data.micro_batches(step * BATCH, batch=BATCH, micro_batch=BATCH)
        ids, labels = batch.input_ids.tolist(), batch.labels.tolist()
        ends = list(itertools.accumulate(batch.lengths))
        found.append(
            [
                (ids[end - n : end], labels[end - n : end])
                for end, n in zip(ends, batch.lengths, strict=True)
            ]
        )
    return found


def monolithic(steps: int, threads: int) -> None:
    """Train with PEFT in this process; print tokens per second. Runs as a child of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo.base_folder(), dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), fan_in_fan_out=True)
    model = get_peft_model(base.eval(), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    tokens = 0
    began = 0.0
    for step, rows in enumerate(batches(steps)):
        if step == WARM_UP_STEPS:
            began = time.perf_counter()
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([own + [-100] * (width - len(own)) for _, own in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= WARM_UP_STEPS:
            tokens += sum(len(ids) for ids, _ in rows)
    print(tokens / (time.perf_counter() - began))


def run_monolithic(steps: int, threads: int) -> float:
    command = [sys.executable, "-m", __spec__.name, "--monolithic", str(steps), str(threads)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def run_split(folder: Path, url: str, labels: str, options: argparse.Namespace) -> Split:
    steps, threads = options.steps, options.threads
    with System(folder, url) as system:
        coordinator = system.coordinator(settings(labels, options))
        shard = demo.shards()[0]
        flags = ["--evaluation-data", str(shard.held_out), "--threads", str(threads)]
        flags += ["--share-labels"] if labels == "server" else []
        agent = system.agent(DEVICE, shard.training, *flags)
        if coordinator.wait(600) or agent.wait(60):
            raise SystemExit(f"the run failed:\n{coordinator.text()}\n{agent.text()}")
        closed = [line for line in system.metrics() if "train/loss" in line]
    first, last = closed[WARM_UP_STEPS - 1], closed[-1]
    tokens = tokens_per_step(steps)[WARM_UP_STEPS:]
    tensors = {"server": 2, "device": 4}[labels]
    item = ITEM_BYTES[options.wire_dtype]
    moved = sum(
        last[f"traffic/bytes_{way}"] - first[f"traffic/bytes_{way}"] for way in ("up", "down")
    )
    return Split(
        tokens_per_s=sum(tokens) / (last["time"] - first["time"]),
        bytes_per_step=moved / len(tokens),
        least_bytes_per_step=tensors * item * HIDDEN * sum(tokens) / len(tokens),
    )


def main() -> None:
    """Measure in turns, print a table, write build/bench/throughput.json."""
    options = _options()
    if options.monolithic:
        monolithic(*options.monolithic)
        return
    single: dict[int, list[float]] = {threads: [] for threads in options.monolithic_threads}
    split: dict[str, list[Split]] = {labels: [] for labels in AIMS}
    with tempfile.TemporaryDirectory() as temporary, broker(Path(temporary)) as url:
        for repeat in range(options.repeats):
            for labels, done in split.items():
                for threads, measured in single.items():
                    measured.append(run_monolithic(options.steps, threads))
                folder = Path(temporary) / f"{repeat}-{labels}"
                done.append(run_split(folder, url, labels, options))
    rows = [
        _row(labels, threads, single[threads], split[labels])
        for threads in single
        for labels in AIMS
    ]
    _report(rows, options)


def _row(labels: str, threads: int, single: list[float], split: list[Split]) -> dict[str, Any]:
    own = statistics.median(one.tokens_per_s for one in split)
    reference = statistics.median(single)
    moved = statistics.median(one.bytes_per_step for one in split)
    least = split[0].least_bytes_per_step
    return {
        "labels": labels,
        "monolithic_threads": threads,
        "ratio": own / reference,
        "aim": AIMS[labels],
        "split_tokens_per_s": own,
        "monolithic_tokens_per_s": reference,
        "bytes_per_step": moved,
        "least_bytes_per_step": least,
        "overhead": moved / least - 1,
        "split_runs": [asdict(one) for one in split],
        "monolithic_runs": single,
    }


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(
        f"split layer {options.split_layer}, batch {BATCH}, micro-batch {options.micro_batch}, "
        f"{options.in_flight} in flight, {options.wire_dtype} on the wire; agent and coordinator "
        f"with {options.threads} thread(s) each; median of {options.repeats} runs in turns"
    )
    print(
        f"{'labels':<8}{'PEFT threads':>13}{'split tok/s':>13}{'PEFT tok/s':>12}{'ratio':>8}"
        f"{'aim':>6}{'bytes/step':>12}{'least':>10}{'overhead':>10}"
    )
    for row in rows:
        print(
            f"{row['labels']:<8}{row['monolithic_threads']:>13}{row['split_tokens_per_s']:>13.0f}"
            f"{row['monolithic_tokens_per_s']:>12.0f}{row['ratio']:>8.2f}{row['aim']:>6.2f}"
            f"{row['bytes_per_step']:>12.0f}{row['least_bytes_per_step']:>10.0f}"
            f"{row['overhead']:>10.2%}"
        )
    print(f"aim for the overhead: at most {AIM_OVERHEAD:.0%}")
    write_report("throughput", {"options": vars(options), "rows": rows})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1, help="of agent and coordinator each")
    parser.add_argument(
        "--monolithic-threads", type=int, nargs="+", default=[1, 2], help="of the PEFT loop"
    )
    parser.add_argument("--split-layer", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--wire-dtype", choices=sorted(ITEM_BYTES), default="bfloat16")
    parser.add_argument("--monolithic", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
