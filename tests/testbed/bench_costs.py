"""What the cost model predicts for a device, against what a process measures that does the work.

For two families: the probe measures as it does on a device (few blocks, one micro-batch in
flight); `shared.costs` is fitted to that; then for every point (k, rank, micro-batch, in flight)
a fresh process trains at that point for a while, and its seconds per step and its peak memory are
set beside what was predicted. The link and the server are not in it.

    python -m tests.testbed.bench_costs --threads 1 --repeats 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from edge_agent.probe_spec import SPEC, ProbeSpec
from edge_agent.probing import ProbeResult, probe
from shared import probe_loads
from shared.architecture import ModelArchitecture
from shared.costs import Costs, fit
from shared.protocol.messages import DeviceId
from shared.protocol.profile import Measurements
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from shared.version import VERSION
from tests.support.probe_specs import first_blocks
from tests.testbed.bench_report import write_report
from tests.testbed.system import ROOT

if TYPE_CHECKING:  # the children must be as light as an agent
    from coordinator.model_store import ModelStore

LENGTH = 128
MICRO_BATCH = 8
RANK = 8
AIMS = {"memory": 0.15, "seconds": 0.20}
TARGETS = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
STEPS = 12
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Point:
    """One way to train: ``in_flight`` micro-batches make a step, all of them open at once."""

    k: int
    rank: int
    micro_batch: int
    in_flight: int


POINTS = (
    Point(1, 4, 4, 1),
    Point(1, 16, 8, 2),
    Point(2, 8, 2, 2),
    Point(2, 32, 8, 1),
    Point(3, 8, 4, 2),
    Point(4, 4, 8, 1),
    Point(4, 16, 2, 4),
    Point(5, 64, 4, 1),
    Point(6, 8, 8, 2),
    Point(6, 32, 1, 1),
    Point(6, 16, 16, 1),
)


@dataclass(frozen=True)
class Work:
    """What a measuring process is told."""

    spec: ProbeSpec
    point: Point
    steps: int


@dataclass(frozen=True)
class Found:
    """What it says."""

    seconds: float
    spread: float
    peak_bytes: int


WORK: TypeAdapter[Work] = TypeAdapter(Work)
FOUND: TypeAdapter[Found] = TypeAdapter(Found)
MEASUREMENTS: TypeAdapter[Measurements] = TypeAdapter(Measurements)


def families(folder: Path) -> Iterator[tuple[str, ModelStore]]:
    """Yield the demo's GPT-2 and a Llama of its size with random weights."""
    from coordinator import demo
    from coordinator.model_store import ModelStore

    cache = folder / "cache"
    yield "gpt2", ModelStore.open(str(demo.base_folder()), cache_folder=cache)
    yield "llama", ModelStore.open(str(_llama(folder / "llama-hf")), cache_folder=cache)


def _llama(folder: Path) -> Path:
    import torch
    import transformers

    from tests.support.vocabularies import byte_level

    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


def pieces(store: ModelStore, folder: Path) -> dict[str, Path]:
    """Write the pieces of a model as a device would hold them."""
    folder.mkdir(parents=True)
    files = {}
    for piece in store.describe().pieces:
        files[piece.name] = folder / f"{piece.name}.safetensors"
        data = store.read(piece.sha256, offset=0, length=piece.size_bytes)
        files[piece.name].write_bytes(data)
    return files


def spec_of(
    store: ModelStore, files: Mapping[str, Path], targets: tuple[str, ...], threads: int
) -> ProbeSpec:
    """Return what a device knows of this model."""
    return ProbeSpec(
        backend="torch",
        device="cpu",
        threads=threads,
        config_json=store.describe().config_json,
        files=files,
        device_id=DeviceId("bench"),
        training=TrainingTerms(max_length=LENGTH),
        lora=LoraTerms(r=RANK, target_modules=targets),
        optimizer=OptimizerTerms(),
        micro_batch=MICRO_BATCH,
        length=LENGTH,
    )


def measurements_of(result: ProbeResult, spec: ProbeSpec, backend: str) -> Measurements:
    """Return the result as it would travel."""
    return Measurements(
        hsplit_version=VERSION,
        backend=backend,
        dtype=spec.training.dtype,
        threads=spec.threads,
        model=ModelArchitecture.from_config(json.loads(spec.config_json)).fingerprint,
        on_gpu=result.on_gpu,
        runtime_bytes=result.runtime_bytes,
        blocks=result.blocks,
        head=result.head,
        optimizer=result.optimizer,
    )


def predicted(costs: Costs, point: Point, parameters: int) -> Found:
    """Return what the cost model says of a point."""
    tokens = point.micro_batch * LENGTH
    shape = {"blocks": point.k, "tokens": tokens, "adapter_parameters": parameters}
    micro = costs.forward_s(**shape) + costs.backward_s(**shape) + costs.head_s(tokens=tokens)
    step = point.in_flight * micro + costs.optimizer_s(adapter_parameters=parameters)
    peak = costs.peak_bytes(**shape, in_flight=point.in_flight, head_tokens=tokens)
    return Found(float(step), 0.0, round(float(peak)))


def train(work: Work) -> Found:
    """Train at a point in this process; return the median step and the peak memory."""
    from edge_agent.backends import open_backend
    from edge_agent.backends.base import FrontBase, MicroBatch, TokenBatch
    from shared.clock import SystemClock
    from shared.memory_use import watched_peak
    from shared.repeats import stopwatch

    spec, point = work.spec, work.point
    architecture = ModelArchitecture.from_config(json.loads(spec.config_json))
    backend = open_backend(spec.backend, device=spec.device, threads=spec.threads)
    names = architecture.front_pieces(point.k, head_on_device=True)
    backend.load(
        FrontBase(spec.config_json, {name: spec.files[name] for name in names}, point.k),
        device_id=spec.device_id,
        training=spec.training,
        lora=spec.lora,
        optimizer=spec.optimizer,
    )
    ranks = ranks_of(architecture, spec.lora, point)
    backend.set_adapters(probe_loads.fresh_adapters(architecture, ranks, seed=1), fold=False)
    count, words = point.micro_batch * LENGTH, architecture.vocab_size
    ids = probe_loads.random_tokens(count, vocab_size=words, seed=2)
    batch = TokenBatch(ids, np.roll(ids, -1), (LENGTH,) * point.micro_batch)

    def step(number: int) -> None:
        keys = [MicroBatch(number, index) for index in range(point.in_flight)]
        hidden = [backend.forward(key, batch, train=True) for key in keys]
        for key, frame in zip(keys, hidden, strict=True):
            _, gradient = backend.head(key, frame, train=True)
            assert gradient is not None
            backend.backward(key, gradient)
        backend.step(number, target_tokens=count * point.in_flight)

    clock = SystemClock()
    with watched_peak(backend) as peak:
        taken = [stopwatch(lambda n=n: step(n), clock) for n in range(work.steps)][WARM_UP_STEPS:]
    median = statistics.median(taken)
    return Found(median, (max(taken) - min(taken)) / median, peak.peak_bytes)


def ranks_of(architecture: ModelArchitecture, lora: LoraTerms, point: Point) -> dict[str, int]:
    """Return the ranks of a front of ``point.k`` blocks."""
    terms = LoraTerms(r=point.rank, target_modules=lora.target_modules)
    return architecture.target_modules(terms, blocks=range(point.k))


def run_probe(spec: ProbeSpec) -> Measurements:
    """Probe as an agent does: from a process that has the backend open and nothing else."""
    return MEASUREMENTS.validate_json(_child("--probe-child", SPEC.dump_json(spec)))


def probe_child(spec: ProbeSpec) -> Measurements:
    """Be that process."""
    from edge_agent.backends import open_backend

    backend = open_backend(spec.backend, device=spec.device, threads=spec.threads)
    return measurements_of(probe(spec), spec, backend.name)


def run_point(spec: ProbeSpec, point: Point, options: argparse.Namespace) -> Found:
    """Train at a point in fresh processes; return medians over them."""
    work = WORK.dump_json(Work(spec, point, options.steps))
    found = [FOUND.validate_json(_child("--point-child", work)) for _ in range(options.repeats)]
    return Found(
        statistics.median(one.seconds for one in found),
        max(one.spread for one in found),
        round(statistics.median(one.peak_bytes for one in found)),
    )


def _child(flag: str, text: bytes) -> bytes:
    command = [sys.executable, "-m", __spec__.name, flag]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, input=text)
    return done.stdout


def bench_family(
    family: str, store: ModelStore, folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Probe, fit, and measure every point of one family."""
    spec = spec_of(store, pieces(store, folder), TARGETS[family], options.threads)
    measured = run_probe(first_blocks(spec, probe_loads.MOST_BLOCKS))
    costs = fit(measured)
    rows = []
    for point in POINTS:
        parameters = probe_loads.parameter_count(
            store.architecture, ranks_of(store.architecture, spec.lora, point)
        )
        row: dict[str, Any] = {"family": family, **asdict(point), "adapter_parameters": parameters}
        row["runtime_bytes"] = measured.runtime_bytes
        row["predicted"] = asdict(predicted(costs, point, parameters))
        row["measured"] = asdict(run_point(spec, point, options))
        row["errors"] = _errors(row)
        _print_row(row)
        rows.append(row)
    return rows


def _errors(row: Mapping[str, Any]) -> dict[str, float]:
    """Return (predicted - measured) / measured; of memory also without the runtime's share."""
    expected, measured, runtime = row["predicted"], row["measured"], row["runtime_bytes"]
    own = measured["peak_bytes"] - runtime
    return {
        "memory": expected["peak_bytes"] / measured["peak_bytes"] - 1,
        "memory_beyond_runtime": (expected["peak_bytes"] - runtime) / own - 1,
        "seconds": expected["seconds"] / measured["seconds"] - 1,
    }


def _print_row(row: Mapping[str, Any]) -> None:
    expected, measured, errors = row["predicted"], row["measured"], row["errors"]
    print(
        f"{row['family']:<7}{row['k']:>3}{row['rank']:>6}{row['micro_batch']:>7}"
        f"{row['in_flight']:>7}"
        f"{expected['peak_bytes'] / 2**20:>11.0f}{measured['peak_bytes'] / 2**20:>10.0f}"
        f"{errors['memory']:>8.1%}{errors['memory_beyond_runtime']:>9.1%}"
        f"{expected['seconds'] * 1e3:>11.1f}{measured['seconds'] * 1e3:>10.1f}"
        f"{errors['seconds']:>8.1%}{measured['spread']:>8.0%}",
        flush=True,
    )


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    summary = {}
    for what in rows[0]["errors"]:
        sizes = [abs(row["errors"][what]) for row in rows]
        summary[what] = {"median": statistics.median(sizes), "worst": max(sizes)}
        aim = f" (aim: median at most {AIMS[what]:.0%})" if what in AIMS else ""
        print(f"{what}: median error {summary[what]['median']:.1%}, worst {max(sizes):.1%}{aim}")
    found = {"options": vars(options), "aims": AIMS, "summary": summary, "rows": rows}
    write_report("costs", found)


def main() -> None:
    """Probe, predict, measure, print a table, write build/bench/costs.json."""
    options = _options()
    if options.point_child:
        found = train(WORK.validate_json(sys.stdin.buffer.read()))
        sys.stdout.buffer.write(FOUND.dump_json(found))
        return
    if options.probe_child:
        measured = probe_child(SPEC.validate_json(sys.stdin.buffer.read()))
        sys.stdout.buffer.write(MEASUREMENTS.dump_json(measured))
        return
    print(
        f"{LENGTH} tokens a sequence, probed at {MICRO_BATCH} sequences and rank {RANK}; "
        f"{options.threads} thread(s), {options.steps} steps, median of {options.repeats} processes"
    )
    print(
        f"{'family':<7}{'k':>3}{'rank':>6}{'micro':>7}{'flight':>7}"
        f"{'MiB pred.':>11}{'measured':>10}{'error':>8}{'-runtime':>9}"
        f"{'ms pred.':>11}{'measured':>10}{'error':>8}{'spread':>8}"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for family, store in families(Path(temporary)):
            rows += bench_family(family, store, Path(temporary) / family, options)
    _report(rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="processes a point")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--point-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--probe-child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
