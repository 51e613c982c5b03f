"""What is measured of a backend, in this process: points, limits, and smaller ones instead."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from edge_agent.backends.base import FrontBase, MicroBatch, TokenBatch
from edge_agent.backends.torch_backend import TorchBackend
from edge_agent.probe_run import ProbeRun
from edge_agent.probe_spec import ProbeLine, ProbeSpec
from shared.errors import PlanError
from shared.memory_use import resident_bytes
from shared.protocol.tensors import TensorFrame
from shared.terms import TrainingTerms
from tests.support.backends_with_graphs import WithGraphs
from tests.support.fake_clock import FakeClock
from tests.support.probe_specs import first_blocks, probe_spec
from tests.support.tiny_models import CLASSIFYING, FAMILIES

MIB = 2**20


def spec(folder: Path, *, blocks: int = 3, **changes: Any) -> ProbeSpec:
    """Return what a probe is told of a model's first ``blocks``."""
    return first_blocks(probe_spec(folder, **{"budget_s": 500.0, **changes}), blocks)


def run(spec: ProbeSpec, backend: TorchBackend | None = None) -> list[ProbeLine]:
    lines: list[ProbeLine] = []
    backend = backend or TorchBackend("cpu", threads=1)
    ProbeRun(backend, spec, clock=TickingClock(), say=lines.append).run()
    return lines


def sizes(lines: list[ProbeLine]) -> list[tuple[int, int, int]]:
    """Return blocks, tokens and micro-batches in flight of every point of blocks, in order."""
    found = [line.block for line in lines if line.block is not None]
    return [(p.blocks, p.sequences * p.length, p.in_flight) for p in found]


class TickingClock(FakeClock):
    """A clock by which whatever is timed takes a second."""

    def monotonic_s(self) -> float:
        self.advance(1.0)
        return super().monotonic_s()


class SmallBackend(TorchBackend):
    """A backend in whose memory there is room for so many tokens and blocks."""

    def __init__(self, *, tokens: int = 10**6, blocks: int = 10**6) -> None:
        super().__init__("cpu", threads=1)
        self.tokens = tokens
        self.blocks = blocks

    def load(self, base: FrontBase, **terms: object) -> None:  # type: ignore[override]
        if base.split_layer > self.blocks:
            raise PlanError("no room for the weights")
        super().load(base, **terms)  # type: ignore[arg-type]

    def forward(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> TensorFrame:
        if len(batch.input_ids) > self.tokens:
            raise PlanError("no room for the activations")
        return super().forward(key, batch, train=train)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_at_all_points(tmp_path, family):
    lines = run(spec(tmp_path, family=family))
    assert lines[0].runtime_bytes is not None
    assert sizes(lines) == [(1, 16, 1), (1, 64, 1), (3, 16, 1), (3, 64, 1), (3, 64, 2)]
    assert [line.head.tokens for line in lines if line.head] == [64, 16]
    assert len([line for line in lines if line.optimizer]) == 2
    assert not [line for line in lines if line.warning]


def test_a_backend_that_computes_with_graphs_is_given_them(tmp_path):
    backend = WithGraphs()
    graphs = {"graph.head": tmp_path / "head"}
    run(dataclasses.replace(spec(tmp_path), graphs=graphs), backend)
    assert backend.given == graphs


@pytest.mark.parametrize("family", CLASSIFYING)
def test_every_family_is_measured_as_a_classifier(tmp_path, family):
    terms = TrainingTerms(task="classification", classes=("no", "yes"), max_length=32)
    lines = run(spec(tmp_path, family=family, training=terms))
    assert sizes(lines) == [(1, 16, 1), (1, 64, 1), (3, 16, 1), (3, 64, 1), (3, 64, 2)]
    assert [line.head.tokens for line in lines if line.head] == [64, 16]
    assert len([line for line in lines if line.optimizer]) == 2
    assert not [line for line in lines if line.warning]


def test_larger_adapters_are_measured_with_as_many_parameters_as_they_have(tmp_path):
    points = [line.block for line in run(spec(tmp_path)) if line.block]
    per_rank = 32 + 96  # GPT-2's c_attn, of a hidden size of 32
    assert [p.adapter_parameters for p in points] == [
        rank * blocks * per_rank for rank, blocks in ((4, 1), (4, 1), (4, 3), (4, 3), (16, 3))
    ]


def test_no_head_is_measured_where_the_server_has_it(tmp_path):
    terms = TrainingTerms(max_length=32, labels="server")
    lines = run(spec(tmp_path, training=terms))
    assert len(sizes(lines)) == 5
    assert not [line for line in lines if line.head]


def test_one_block_and_one_sequence_still_give_points_that_differ(tmp_path):
    lines = run(spec(tmp_path, blocks=1, micro_batch=1))
    assert sizes(lines) == [(1, 8, 1), (1, 16, 1), (1, 16, 2)]


def test_activations_that_do_not_fit_are_replaced_by_fewer(tmp_path):
    lines = run(spec(tmp_path), SmallBackend(tokens=40))
    assert sizes(lines) == [(1, 16, 1), (1, 32, 1), (3, 16, 1), (3, 32, 1), (3, 32, 2)]
    assert [line.head.tokens for line in lines if line.head] == [32, 16]
    warnings = [line.warning for line in lines if line.warning]
    assert "1 block on 4 x 16 tokens did not fit, 1 block on 2 x 16 tokens did" in warnings[0]
    assert "no room for the activations" in warnings[0]


def test_blocks_that_do_not_fit_are_replaced_by_fewer(tmp_path):
    lines = run(spec(tmp_path), SmallBackend(blocks=2))
    assert {blocks for blocks, _, _ in sizes(lines)} == {1, 2}


def test_not_even_one_block_is_an_error(tmp_path):
    with pytest.raises(PlanError, match="no room for the weights"):
        run(spec(tmp_path), SmallBackend(blocks=0))


def test_what_would_pass_the_owners_limit_is_not_tried(tmp_path):
    limit = resident_bytes() + 1 * MIB
    heavy = spec(tmp_path, micro_batch=4096, memory_bytes=limit)
    backend = SmallBackend()
    lines = run(heavy, backend)
    warnings = " ".join(line.warning for line in lines if line.warning)
    assert f"of the {limit / MIB:.0f} MiB that this device may use" in warnings
    assert max(tokens for _, tokens, _ in sizes(lines)) < 4096 * 16


def test_what_the_agent_holds_beside_is_in_every_number(tmp_path):
    more = 512 * MIB
    lines = run(spec(tmp_path, program_bytes=resident_bytes() + more))
    runtime = lines[0].runtime_bytes
    assert runtime is not None
    assert runtime >= resident_bytes() + 0.9 * more
    assert all(line.block.peak_bytes > runtime for line in lines if line.block)


def test_a_time_that_is_used_up_ends_it_after_the_least_points(tmp_path):
    lines = run(spec(tmp_path, budget_s=1e-6))
    assert len(sizes(lines)) == 3
    assert next(line.warning for line in lines if line.warning).startswith("no time was left for")


def test_every_attempt_is_announced_before_it_is_made(tmp_path):
    lines = run(spec(tmp_path))
    for before, line in itertools.pairwise(lines):
        if line.block or line.head or line.optimizer:
            assert before.attempt is not None
