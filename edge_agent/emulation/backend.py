"""A smaller device's computing: slower, and with less memory, than this machine's.

A call takes 1 / speed of its own computing time: what it did not take is slept. On the CPU
that time is the calling thread's CPU time and not the wall's, because a fleet on one machine
shares its cores: a wait for a core is no part of the computation. With one thread this is
exact; with several, torch's threads spin while they wait for one another, so a machine with
too few cores for all makes the emulated device slower than asked. On a GPU it is wall time,
so each emulated device needs a GPU of its own.

Memory is counted as in `shared.memory_use`, the whole program's, and looked at after each call:
the most that it took since the part was loaded, or since too much was given up. Python and
torch take about 300 MiB of it before anything of a model is there, as they would on a small
device. What a load takes beside its result does not count.

Only the backend is slowed: what else an agent does (packing tensors, cutting messages) runs at
this machine's speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from edge_agent.backends.base import Backend, FrontBase, MicroBatch, TokenBatch
from edge_agent.emulation.spec import Emulation
from shared.adapters import AdapterState, HeldAdapters
from shared.class_counts import ClassCounts
from shared.classifier_weights import ClassifierTensors
from shared.errors import MemoryFullError
from shared.memory_use import (
    AcceleratorMemory,
    forget_peak,
    resident_bytes,
    resident_peak_bytes,
    trim,
)
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

MIB = 2**20

T = TypeVar("T")


def rest_s(computed_s: float, passed_s: float, *, speed: float) -> float:
    """Return how long to rest after a call, so that in all it takes ``computed_s / speed``.

    ``computed_s`` is what the computation itself took, ``passed_s`` what passed on the wall.
    """
    return max(0.0, computed_s / speed - passed_s)


class EmulatedBackend:
    """A `Backend` that is slower and smaller than the one inside. Belongs to the same thread.

    Whatever it is asked may also end in a `MemoryFullError`: the emulated memory is full.
    """

    def __init__(
        self,
        inner: Backend,
        emulation: Emulation,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Wrap ``inner``; only tests need another ``sleep``."""
        self.name = inner.name
        self.needs_graphs = inner.needs_graphs
        self._inner = inner
        self._emulation = emulation
        self._sleep = sleep
        self._is_over = False
        self._peak_counts = False
        on_gpu = inner.accelerator is not None
        self._computed_s = time.perf_counter if on_gpu else time.thread_time

    @property
    def accelerator(self) -> str | None:
        """The name of the GPU that it computes on; None on the CPU."""
        return self._inner.accelerator

    @property
    def computes_with(self) -> str:
        """As the backend inside; see `Backend.computes_with`."""
        return self._inner.computes_with

    def load(
        self,
        base: FrontBase,
        *,
        device_id: DeviceId,
        training: TrainingTerms,
        lora: LoraTerms,
        optimizer: OptimizerTerms,
    ) -> None:
        """As the backend inside; see `Backend.load`."""
        self._slowed(
            lambda: self._inner.load(
                base, device_id=device_id, training=training, lora=lora, optimizer=optimizer
            )
        )
        if self._emulation.memory_bytes is not None:
            self._forget_peak()
        self._check_memory()

    def set_adapters(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """As the backend inside; see `Backend.set_adapters`."""
        self._held_to_it(lambda: self._inner.set_adapters(adapters, fold=fold))

    def set_classifier(self, weights: ClassifierTensors) -> None:
        """As the backend inside; see `Backend.set_classifier`."""
        self._held_to_it(lambda: self._inner.set_classifier(weights))

    def classifier(self) -> ClassifierTensors:
        """As the backend inside; see `Backend.classifier`."""
        return self._inner.classifier()

    def take_counts(self) -> ClassCounts:
        """As the backend inside; see `Backend.take_counts`."""
        return self._inner.take_counts()

    def forward(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> TensorFrame:
        """As the backend inside; see `Backend.forward`."""
        return self._held_to_it(lambda: self._inner.forward(key, batch, train=train))

    def backward(self, key: MicroBatch, gradient: TensorFrame) -> None:
        """As the backend inside; see `Backend.backward`."""
        self._held_to_it(lambda: self._inner.backward(key, gradient))

    def head(
        self, key: MicroBatch, hidden: TensorFrame, *, train: bool
    ) -> tuple[float, TensorFrame | None]:
        """As the backend inside; see `Backend.head`."""
        return self._held_to_it(lambda: self._inner.head(key, hidden, train=train))

    def whole(self, key: MicroBatch, batch: TokenBatch, *, train: bool) -> float:
        """As the backend inside; see `Backend.whole`."""
        return self._held_to_it(lambda: self._inner.whole(key, batch, train=train))

    def step(self, step: int, *, target_tokens: int) -> float:
        """As the backend inside; see `Backend.step`."""
        return self._held_to_it(lambda: self._inner.step(step, target_tokens=target_tokens))

    def begin_probe(self, modules: Collection[str]) -> None:
        """As the backend inside; see `Backend.begin_probe`."""
        self._inner.begin_probe(modules)

    def end_probe(self) -> Mapping[str, float]:
        """As the backend inside; see `Backend.end_probe`."""
        return self._inner.end_probe()

    def wait(self) -> None:
        """As the backend inside; see `Backend.wait`."""
        self._inner.wait()

    def restart_memory_peak(self) -> None:
        """As the backend inside; see `Backend.restart_memory_peak`."""
        self._inner.restart_memory_peak()

    def accelerator_memory(self) -> AcceleratorMemory | None:
        """As the backend inside; see `Backend.accelerator_memory`."""
        return self._inner.accelerator_memory()

    def discard(self) -> None:
        """As the backend inside; see `Backend.discard`."""
        self._inner.discard()
        if self._is_over:
            self._forget_peak()

    def adapters(self) -> AdapterState:
        """As the backend inside; see `Backend.adapters`."""
        return self._inner.adapters()

    def _held_to_it(self, call: Callable[[], T]) -> T:
        """Carry out ``call`` in the time and the memory that the emulated device has."""
        result = self._slowed(call)
        self._check_memory()
        return result

    def _slowed(self, call: Callable[[], T]) -> T:
        passed_from_s, computed_from_s = time.perf_counter(), self._computed_s()
        result = call()
        self._inner.wait()
        computed_s = self._computed_s() - computed_from_s
        passed_s = time.perf_counter() - passed_from_s
        self._sleep(rest_s(computed_s, passed_s, speed=self._emulation.speed))
        return result

    def _check_memory(self) -> None:
        if self._emulation.memory_bytes is not None:
            host_bytes = resident_peak_bytes() if self._peak_counts else resident_bytes()
            used_bytes = whole_bytes(host_bytes, self._inner.accelerator_memory())
            self._is_over = used_bytes > self._emulation.memory_bytes
            check_memory(used_bytes, self._emulation.memory_bytes)

    def _forget_peak(self) -> None:
        """Count from what is held now: what was too much, and is given up, must not be left."""
        self._inner.restart_memory_peak()
        trim()
        self._peak_counts = forget_peak()
        self._is_over = False


def whole_bytes(host_bytes: int, accelerator: AcceleratorMemory | None) -> int:
    """Return a program's peak, as `shared.memory_use` counts it."""
    if accelerator is None:
        return host_bytes
    peak_bytes = accelerator.peak_bytes + accelerator.runtime_bytes
    return peak_bytes if accelerator.is_own else peak_bytes + host_bytes


def check_memory(used_bytes: int, limit_bytes: int) -> None:
    """Do nothing while it fits.

    Raises:
        MemoryFullError: more is used than the emulated device has.
    """
    if used_bytes > limit_bytes:
        raise MemoryFullError(
            f"this emulated device is out of memory: {used_bytes / MIB:.0f} MiB of "
            f"{limit_bytes / MIB:.0f} MiB used (--emulate memory): lower plan.micro_batch, "
            "plan.in_flight, plan.split_layer or training.max_length"
        )
