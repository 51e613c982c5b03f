"""What the server's part of the work costs here: the real trainer, on a few blocks, for seconds.

In the coordinator's own process and before a run starts, not in a child as on a device: what is
measured is then exactly the program that will train, with its threads, its allocator and all
that it holds already; nothing is lost if it fails, because no device works yet; and a server
that cannot take the few blocks measured here could not take its part of the model either. It
saves a second start of torch, too. What is built for it is gone when this returns.

The last blocks are measured: all blocks of a model cost the same. Where the checkpoint's files
are mapped into memory their pages count, as they stay in memory while nobody else needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from coordinator.back_pass import MicroBatchInput, MicroBatchKey
from coordinator.model_store import ModelStore
from coordinator.server_training import ServerTrainer
from coordinator.settings import CoordinatorSettings
from shared import probe_loads, version
from shared.architecture import ModelArchitecture
from shared.clock import Clock
from shared.memory_use import total_bytes, trim, watched_peak
from shared.modeling.accelerator import TorchMemory
from shared.modeling.compute import compute_device
from shared.modeling.skeleton import Tensors, as_mapping
from shared.probe_loads import Load
from shared.protocol.messages import DeviceId
from shared.protocol.profile import BlockPoint, HeadPoint, Measurements, OptimizerPoint
from shared.protocol.tensors import TensorFrame, pack
from shared.repeats import Once, TimeBudget, Timing, repeat, stopwatch
from shared.terms import LabelMode, LoraTerms, OptimizerTerms, TrainingTerms

BUDGET_S = 10.0
SEED = 0
_DEVICE = DeviceId("probe")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServerWork:
    """What the server is measured with: a model, the run's terms, and one micro-batch's size.

    ``device``: as for `ServerTrainer`.
    """

    config: Mapping[str, Any]
    tensors: Tensors
    training: TrainingTerms
    lora: LoraTerms
    optimizer: OptimizerTerms
    micro_batch: int
    length: int
    device: str | None = None

    @classmethod
    def of(
        cls, settings: CoordinatorSettings, store: ModelStore, *, micro_batch: int, length: int
    ) -> ServerWork:
        """Return the work of a run's server on micro-batches of this size."""
        return cls(
            config=store.config,
            tensors=store.tensors(),
            training=settings.training_terms,
            lora=settings.lora,
            optimizer=settings.optimizer,
            micro_batch=micro_batch,
            length=length,
            device=settings.compute_device,
        )


def measure_server(
    work: ServerWork, clock: Clock, *, memory_bytes: int | None = None, budget_s: float = BUDGET_S
) -> Measurements:
    """Return what `ServerTrainer` takes of time and memory here, in about ``budget_s``.

    With `labels: server` the head's weights are in the memory of every point, as in training.
    Each device but the first with a share in an open step takes 4 bytes more per adapter
    parameter. ``memory_bytes``: what training may use in all; None: no limit is known.

    Raises:
        ConfigError: no such device, or no way to measure memory here.
        ModelError: unsupported family, or a tensor is missing or misshapen.
        PlanError: not even a few blocks fit, or a target module does not exist.
    """
    return _Run(work, clock, budget_s).measure(memory_bytes)


class _Run:
    """One measuring of one server."""

    def __init__(self, work: ServerWork, clock: Clock, budget_s: float) -> None:
        self._work = replace(work, tensors=as_mapping(work.tensors))
        self._clock = clock
        self._architecture = ModelArchitecture.from_config(work.config, work.training)
        self._head_is_here = work.training.labels == "server"
        self._torch_device = compute_device(work.device)
        self._memory = TorchMemory(self._torch_device)
        self._memory.restart_memory_peak()
        trim()
        accelerator = self._memory.accelerator_memory()
        self._on_gpu = accelerator is not None and accelerator.is_own
        self._runtime_bytes = total_bytes(self._memory)
        self._planned = probe_loads.loads(
            self._architecture.block_count,
            micro_batch=work.micro_batch,
            length=work.length,
            head=self._head_is_here,
        )
        self._budget = TimeBudget(budget_s, parts=len(self._planned), clock=clock)

    def measure(self, memory_bytes: int | None) -> Measurements:
        heads, head_bytes = self._heads()
        blocks, optimizer = self._blocks()
        return Measurements(
            hsplit_version=version.VERSION,
            backend="torch",
            dtype=self._work.training.dtype,
            threads=None if self._torch_device.type == "cuda" else torch.get_num_threads(),
            model=self._architecture.fingerprint,
            on_gpu=self._on_gpu,
            runtime_bytes=self._runtime_bytes,
            memory_bytes=memory_bytes,
            blocks=tuple(replace(p, peak_bytes=p.peak_bytes + head_bytes) for p in blocks),
            head=tuple(heads),
            optimizer=tuple(optimizer),
        )

    def _heads(self) -> tuple[list[HeadPoint], int]:
        """Return the head's points, and what its weights take; nothing where it is on devices."""
        if not self._head_is_here:
            return [], 0
        trim()
        before = total_bytes(self._memory)
        # A back without a block is the head alone.
        side = self._side(self._architecture.block_count, "server")
        trim()
        head_bytes = max(0, total_bytes(self._memory) - before)
        loads = [load for load in self._planned if load.part == "head"]
        return [self._head(side, load) for load in loads], head_bytes

    def _head(self, side: _Side, load: Load) -> HeadPoint:
        once = side.work_on(load)
        with watched_peak(self._memory) as peak:
            timing, _ = self._repeat(once)
        return probe_loads.head_point(load, timing, extra_bytes=peak.rise_bytes)

    def _blocks(self) -> tuple[list[BlockPoint], list[OptimizerPoint]]:
        points: list[BlockPoint] = []
        steps: list[OptimizerPoint] = []
        held: tuple[int, bool] | None = None
        for load in self._planned:
            if load.part == "head":
                continue
            if held != (load.blocks, load.larger_adapters):
                side = None  # first the old one, so that there is never room needed for two
                first = self._architecture.block_count - load.blocks
                side = self._side(first, "device", larger_adapters=load.larger_adapters)
                held = (load.blocks, load.larger_adapters)
            assert side is not None
            if load.part == "blocks":
                points.append(self._block(side, load))
            else:
                steps.append(self._step(side, load))
        return points, steps

    def _block(self, side: _Side, load: Load) -> BlockPoint:
        once = side.work_on(load)
        with watched_peak(self._memory) as peak:
            forward, backward = self._repeat(once)
        side.forget()
        return probe_loads.block_point(
            load,
            forward,
            backward,
            adapter_parameters=side.parameters,
            peak_bytes=peak.peak_bytes,
        )

    def _step(self, side: _Side, load: Load) -> OptimizerPoint:
        through = side.work_on(load)

        def once(number: int) -> tuple[float, ...]:
            through(number)
            return (stopwatch(lambda: side.step(load.tokens), self._clock),)

        (timing,) = self._repeat(once)
        return OptimizerPoint(adapter_parameters=side.parameters, seconds=timing.seconds)

    def _repeat(self, once: Once) -> tuple[Timing, ...]:
        return repeat(once, budget_s=self._budget.next_s(), clock=self._clock)

    def _side(self, first: int, labels: LabelMode, *, larger_adapters: bool = False) -> _Side:
        return _Side(
            self._work, self._clock, first=first, labels=labels, larger_adapters=larger_adapters
        )


class _Side:
    """A server that holds the blocks from ``first`` on, or with `labels: server` the head too."""

    def __init__(
        self,
        work: ServerWork,
        clock: Clock,
        *,
        first: int,
        labels: LabelMode,
        larger_adapters: bool,
    ) -> None:
        self._clock = clock
        self._training = replace(work.training, labels=labels)
        self._architecture = ModelArchitecture.from_config(work.config, work.training)
        self._first = first
        self._trainer = ServerTrainer(
            work.config,
            work.tensors,
            first_block=first,
            training=self._training,
            lora=work.lora,
            optimizer=work.optimizer,
            device=work.device,
        )
        blocks = range(first, self._architecture.block_count)
        ranks = probe_loads.two_ranks(self._architecture, work.lora, blocks=blocks)[larger_adapters]
        self.parameters = probe_loads.parameter_count(self._architecture, ranks)
        adapters = probe_loads.fresh_adapters(self._architecture, ranks, seed=SEED)
        self._trainer.set_adapters(adapters, fold=False)

    def work_on(self, load: Load) -> Once:
        """Return what carries a load there and back and says how long a micro-batch took.

        With `labels: server` both ways are one, and all of it is in the first number. What is
        sent is made now: on a device it would be in another process.
        """
        sent = self._sent(load)
        gradient = self._frame(probe_loads.rows_read(load, self._architecture))

        def forward(key: MicroBatchKey) -> float:
            return stopwatch(partial(self._trainer.train, _DEVICE, key, sent), self._clock)

        def backward(key: MicroBatchKey) -> float:
            answer = partial(self._trainer.train_gradient, _DEVICE, key, gradient)
            return stopwatch(answer, self._clock)

        def once(number: int) -> tuple[float, ...]:
            keys = [MicroBatchKey(number, index) for index in range(load.in_flight)]
            there_s = sum(map(forward, keys))
            stays_open = self._training.labels == "device"
            back_s = sum(map(backward, keys)) if stays_open else 0.0
            return there_s / len(keys), back_s / len(keys)

        return once

    def step(self, target_tokens: int) -> None:
        """Take an optimizer step on what came through."""
        self._trainer.close_step(0, devices=(_DEVICE,), target_tokens=target_tokens)

    def forget(self) -> None:
        """Drop the gradients of what came through."""
        self._trainer.drop(_DEVICE)

    def _sent(self, load: Load) -> MicroBatchInput:
        labels_N = probe_loads.random_labels(load, self._architecture, seed=SEED)
        return MicroBatchInput(
            split_layer=self._first,
            lengths=(load.length,) * load.sequences,
            hidden=self._frame(load.tokens),
            labels=pack(labels_N) if self._training.labels == "server" else None,
        )

    def _frame(self, rows: int) -> TensorFrame:
        """Return values (N, D) as activations or their gradient may be."""
        width = self._architecture.hidden_size
        small_ND = probe_loads.small_values_ND(rows, width, seed=SEED)
        return pack(small_ND, self._training.wire_dtype)
