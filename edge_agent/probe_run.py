"""Measuring a backend: which points, what each takes of time and memory, when to stop.

The loads are those that training makes: pieces from files, packed tokens in, frames in the wire
dtype out. A point that would not fit is replaced by a smaller one; what is left of the time is
shared out over what is left to do.

Shape suffixes: N packed tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from edge_agent.backends.base import Backend, FrontBase, MicroBatch, TokenBatch
from edge_agent.probe_spec import LEAST_POINTS, ProbeLine, ProbeSpec
from shared import probe_loads
from shared.architecture import ModelArchitecture
from shared.clock import Clock
from shared.errors import PlanError
from shared.memory_use import MemoryPeak, resident_bytes, total_bytes, trim, watched_peak
from shared.probe_loads import Load, Ranks
from shared.protocol.profile import BlockPoint, HeadPoint, OptimizerPoint
from shared.protocol.tensors import TensorFrame, pack
from shared.repeats import TimeBudget, repeat, stopwatch

Say: TypeAlias = Callable[[ProbeLine], None]

SEED = 0


class ProbeRun:
    """One probe of one backend; `run` may be called once."""

    def __init__(self, backend: Backend, spec: ProbeSpec, *, clock: Clock, say: Say) -> None:
        """Take note of what the program takes before it holds anything of a model.

        Raises:
            ConfigError: this system does not tell what memory a process has.
        """
        self._backend = backend
        self._spec = spec
        self._clock = clock
        self._say = say
        self._architecture = ModelArchitecture.from_config(
            json.loads(spec.config_json), spec.training
        )
        self._memory = _Memory(backend, spec)
        self._planned = probe_loads.loads(
            spec.block_count,
            micro_batch=spec.micro_batch,
            length=spec.length,
            head=spec.training.labels == "device",
        )
        self._budget = TimeBudget(spec.budget_s, parts=len(self._planned), clock=clock)
        self._held: tuple[int, bool] | None = None
        self._done: set[Load] = set()
        self._points = 0
        self._seconds_per_size = 0.0

    def run(self) -> None:
        """Measure all points that fit, and say each as soon as it is known.

        Raises:
            PlanError: the memory does not suffice for the weights of one block.
            ModelError: the pieces are not of this model.
        """
        memory = self._memory
        self._say(
            ProbeLine(
                runtime_bytes=memory.runtime_bytes,
                on_gpu=memory.on_gpu,
                computes_with=self._backend.computes_with,
            )
        )
        for load in self._planned:
            expected_s = self._seconds_per_size * load.size
            if self._points >= LEAST_POINTS and expected_s > self._budget.left_s:
                self._say(ProbeLine(warning=f"no time was left for {load}"))
            else:
                self._measure(load)

    def _measure(self, load: Load) -> None:
        """Measure ``load``, or the largest smaller one that fits."""
        load = self._held_for(load)
        smaller: Load | None = load
        trouble = ""
        while smaller is not None and smaller not in self._done:
            try:
                self._attempt(smaller)
                break
            except PlanError as error:
                self._backend.discard()
                trouble, smaller = str(error), smaller.halved()
        if trouble:
            instead = "nothing" if smaller is None else str(smaller)
            self._say(ProbeLine(warning=f"{load} did not fit, {instead} did: {trouble}"))

    def _held_for(self, load: Load) -> Load:
        """Hold what ``load`` needs, or fewer blocks; return the load with as many as are held."""
        self._say(ProbeLine(attempt=str(load)))
        try:
            self._hold(load.blocks, larger_adapters=load.larger_adapters)
        except PlanError:
            self._held = None
            if load.blocks == 1:
                raise
            return self._held_for(replace(load, blocks=load.blocks - 1))
        return load

    def _hold(self, blocks: int, *, larger_adapters: bool) -> None:
        if self._held == (blocks, larger_adapters):
            return
        spec = self._spec
        if self._held is None or self._held[0] != blocks:
            with_head = spec.training.labels == "device"
            names = self._architecture.front_pieces(blocks, head_on_device=with_head)
            files = {name: spec.files[name] for name in names}
            self._backend.load(
                FrontBase(spec.config_json, files, blocks, spec.graphs),
                device_id=spec.device_id,
                training=spec.training,
                lora=spec.lora,
                optimizer=spec.optimizer,
            )
        ranks = self._ranks(blocks, larger_adapters)
        adapters = probe_loads.fresh_adapters(self._architecture, ranks, seed=SEED)
        self._backend.set_adapters(adapters, fold=False)
        self._held = (blocks, larger_adapters)

    def _ranks(self, blocks: int, larger_adapters: bool) -> Ranks:
        smaller, larger = probe_loads.two_ranks(
            self._architecture, self._spec.lora, blocks=range(blocks)
        )
        return larger if larger_adapters else smaller

    def _parameters(self, load: Load) -> int:
        ranks = self._ranks(load.blocks, load.larger_adapters)
        return probe_loads.parameter_count(self._architecture, ranks)

    # --- the points ---------------------------------------------------------------------------

    def _attempt(self, load: Load) -> None:
        self._memory.check_room(load)
        if load.part == "blocks":
            self._say(ProbeLine(block=self._blocks(load)))
            self._points += 1
        elif load.part == "head":
            self._say(ProbeLine(head=self._head(load)))
        else:
            self._say(ProbeLine(optimizer=self._optimizer(load)))
        self._backend.discard()
        self._done.add(load)

    def _blocks(self, load: Load) -> BlockPoint:
        batch, gradient = self._batch(load), self._gradient(load)

        def forward(key: MicroBatch) -> float:
            return stopwatch(partial(self._forward, key, batch), self._clock)

        def backward(key: MicroBatch) -> float:
            return stopwatch(partial(self._backward, key, gradient), self._clock)

        def once(number: int) -> tuple[float, ...]:
            keys = [MicroBatch(number, index) for index in range(load.in_flight)]
            there_s = sum(map(forward, keys))
            return there_s / len(keys), sum(map(backward, keys)) / len(keys)

        with watched_peak(self._backend) as peak:
            timings = repeat(once, budget_s=self._budget.next_s(), clock=self._clock)
        self._memory.learn(load, peak)
        there, back = timings
        self._seconds_per_size = load.in_flight * (there.seconds + back.seconds) / load.size
        return probe_loads.block_point(
            load,
            there,
            back,
            adapter_parameters=self._parameters(load),
            peak_bytes=self._memory.of_program(peak),
        )

    def _head(self, load: Load) -> HeadPoint:
        key = MicroBatch(0, 0)
        self._backend.forward(key, self._batch(load), train=True)
        # As the server would send it: activations and their gradients are of the same shapes.
        hidden = self._small(probe_loads.rows_read(load, self._architecture))

        def once(_: int) -> tuple[float, ...]:
            return (stopwatch(lambda: self._backend.head(key, hidden, train=True), self._clock),)

        with watched_peak(self._backend) as peak:
            (timing,) = repeat(once, budget_s=self._budget.next_s(), clock=self._clock)
        return probe_loads.head_point(load, timing, extra_bytes=peak.rise_bytes)

    def _optimizer(self, load: Load) -> OptimizerPoint:
        batch, gradient = self._batch(load), self._gradient(load)

        def once(number: int) -> tuple[float, ...]:
            key = MicroBatch(0, number)
            self._forward(key, batch)
            self._backward(key, gradient)
            step = lambda: self._backend.step(0, target_tokens=load.tokens)  # noqa: E731
            return (stopwatch(step, self._clock),)

        (timing,) = repeat(once, budget_s=self._budget.next_s(), clock=self._clock)
        return OptimizerPoint(adapter_parameters=self._parameters(load), seconds=timing.seconds)

    def _forward(self, key: MicroBatch, batch: TokenBatch) -> None:
        self._backend.forward(key, batch, train=True)

    def _backward(self, key: MicroBatch, gradient: TensorFrame) -> None:
        self._backend.backward(key, gradient)
        self._backend.wait()

    def _batch(self, load: Load) -> TokenBatch:
        words = self._architecture.vocab_size
        tokens_N = probe_loads.random_tokens(load.tokens, vocab_size=words, seed=SEED)
        labels_N = probe_loads.random_labels(load, self._architecture, seed=SEED + 1)
        return TokenBatch(tokens_N, labels_N, (load.length,) * load.sequences)

    def _gradient(self, load: Load) -> TensorFrame:
        return self._small(load.tokens)

    def _small(self, rows: int) -> TensorFrame:
        width = self._architecture.hidden_size
        small_ND = probe_loads.small_values_ND(rows, width, seed=SEED)
        return pack(small_ND, self._spec.training.wire_dtype)


class _Memory:
    """What the whole agent takes, as seen from this process, and what it may take."""

    def __init__(self, backend: Backend, spec: ProbeSpec) -> None:
        self._limit_bytes = spec.memory_bytes
        self._rise_per_size = 0.0
        self._backend = backend
        backend.restart_memory_peak()
        trim()
        accelerator = backend.accelerator_memory()
        self.on_gpu = accelerator is not None and accelerator.is_own
        context = 0 if accelerator is None else accelerator.runtime_bytes
        own = 0 if self.on_gpu else resident_bytes()
        # The agent holds text and a connection too: all of a point comes on top of that.
        self._more_bytes = 0 if self.on_gpu else max(0, spec.program_bytes - own)
        self.runtime_bytes = context + own + self._more_bytes

    def of_program(self, peak: MemoryPeak) -> int:
        """Return the peak that the whole agent would have had."""
        return peak.peak_bytes + self._more_bytes

    def learn(self, load: Load, peak: MemoryPeak) -> None:
        """Take note of what a load took beyond the weights."""
        self._rise_per_size = max(self._rise_per_size, peak.rise_bytes / load.size)

    def check_room(self, load: Load) -> None:
        """Raise PlanError where ``load`` would probably take more than this device may use."""
        if self._limit_bytes is None:
            return
        now = total_bytes(self._backend) + self._more_bytes
        expected = now + round(self._rise_per_size * load.size)
        if expected > self._limit_bytes:
            raise PlanError(
                f"{load} would take about {expected / 2**20:.0f} MiB of the "
                f"{self._limit_bytes / 2**20:.0f} MiB that this device may use"
            )
