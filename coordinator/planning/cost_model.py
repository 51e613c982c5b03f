"""Seconds and bytes of a part, for a device and for the server, from what both measured. Pure.

One micro-batch goes through stages in turns: the device computes, sends up, the server computes,
sends down, and so on (`Stages`). Everything is vectorised: devices, split layers, sequences and
micro-batches may be numbers or arrays that broadcast. Compute runs on padded tokens, the wire
carries the tokens that there are, and memory must hold the longest sequences.

What is computed is affine in the sequences of a micro-batch, so m micro-batches of unequal sizes
cost what m of their mean size cost.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.costs import Costs

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = "npt.NDArray[Any] | float"
Integers: TypeAlias = "npt.NDArray[np.int64] | int"

LABEL_BYTES = 4
SPARE = 0.05
"""What a device keeps free beyond what its part should need: predictions are that exact."""
CONTENTION = 3
"""Exponent of `contended_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds of one micro-batch, stage by stage.

    In the order compute[0] up[0] server[0] down[0] compute[1] …; ``compute`` ends it too.
    ``latency_s``: of a message, one way.
    """

    compute: tuple[Numbers, ...]
    up: tuple[Numbers, ...]
    server: tuple[Numbers, ...]
    down: tuple[Numbers, ...]
    latency_s: Numbers
    optimizer_s: Numbers

    def of_row(self, row: int) -> Stages:
        """Return one of many devices' stages, where the numbers are arrays (F,)."""

        def one(numbers: Numbers) -> float:
            return float(np.atleast_1d(numbers)[row])

        return Stages(
            compute=tuple(map(one, self.compute)),
            up=tuple(map(one, self.up)),
            server=tuple(map(one, self.server)),
            down=tuple(map(one, self.down)),
            latency_s=one(self.latency_s),
            optimizer_s=one(self.optimizer_s),
        )

    @property
    def chain_s(self) -> Numbers:
        """One micro-batch from its first stage to its last."""
        ways = 2 * len(self.up) * self.latency_s
        return added(self.compute) + added(self.up) + added(self.server) + added(self.down) + ways

    def cycle_s(self, in_flight: Integers) -> Numbers:
        """How long after one micro-batch the next is done: what is busiest sets the pace."""
        busiest = np.maximum(added(self.compute), added(self.server))
        busiest = np.maximum(np.maximum(busiest, added(self.up)), added(self.down))
        return np.maximum(busiest, self.chain_s / in_flight)

    def step_s(self, micro_batches: Integers, in_flight: Integers) -> Numbers:
        """The whole step of a device that nobody else keeps waiting."""
        more = np.asarray(micro_batches) - 1
        paced = self.chain_s + more * self.cycle_s(in_flight)
        together = np.maximum(self.chain_s + more * self._longest_s(), self._busy_s(micro_batches))
        return np.where(more < in_flight, together, paced) + self.optimizer_s

    def _longest_s(self) -> Numbers:
        """The longest single stage: where all fly at once, the next follows after it."""
        every = (*self.compute, *self.up, *self.server, *self.down)
        return functools.reduce(np.maximum, every)

    def _busy_s(self, micro_batches: Integers) -> Numbers:
        """What the device, and each way of its link, have to do with this many at once."""
        ends = self.compute[0] + self.compute[-1]
        link = np.maximum(added(self.up), added(self.down))
        return np.maximum(micro_batches * added(self.compute), micro_batches * link + ends)


def contended_s(longest_s: Numbers, server_s: Numbers, *, devices: int) -> Numbers:
    """Return the step time of a fleet: its longest device and the server's work in all.

    (longest³ + server³)^(1/3): neither bound alone, because devices wait for each other at the
    server where both are close. The exponent is *ours*. Of 500 random fleets whose devices finish
    together, as the tests of `step_simulation` draw them, the median error is 1 to 6 % while the
    server has less than 0.8 of the longest to do, and 11 to 16 % near 1, too short; the larger of
    both alone is 25 to 30 % too short there.
    """
    if devices == 1:
        return longest_s  # nobody to wait for; the server's part is in it
    return (longest_s**CONTENTION + server_s**CONTENTION) ** (1 / CONTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where the model is cut, and what hangs on that: adapter values in front and back.

    ``residual_bytes``: of the front's frozen residuals.
    """

    split_layer: Integers
    parameters: Numbers
    back_parameters: Numbers
    residual_bytes: Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCosts:
    """What the back costs. ``own`` None: nobody measured it, so its work is free.

    ``parameters`` and ``residual_bytes`` (L + 1,): of all adapters from block k on, by k.
    """

    own: Costs | None
    slowdown: float
    block_count: int
    parameters: Array
    residual_bytes: Array

    def forward_s(self, cut: Cut, tokens: Numbers) -> Numbers:
        """Blocks k..L-1 on one micro-batch of ``tokens`` padded tokens."""
        if self.own is None:
            return 0.0 * tokens
        return self.slowdown * self.own.forward_s(
            blocks=self.block_count - cut.split_layer,
            tokens=tokens,
            adapter_parameters=cut.back_parameters,
        )

    def backward_s(self, cut: Cut, tokens: Numbers) -> Numbers:
        """The same, backwards."""
        if self.own is None:
            return 0.0 * tokens
        return self.slowdown * self.own.backward_s(
            blocks=self.block_count - cut.split_layer,
            tokens=tokens,
            adapter_parameters=cut.back_parameters,
        )

    def head_s(self, tokens: Numbers) -> Numbers:
        """The loss and its gradient."""
        return 0.0 * tokens if self.own is None else self.slowdown * self.own.head_s(tokens=tokens)

    def optimizer_s(self, first_block: int) -> float:
        """One optimizer step over the adapters from ``first_block`` on."""
        if self.own is None or first_block == self.block_count:
            return 0.0
        parameters = self.parameters[first_block]
        return float(self.slowdown * self.own.optimizer_s(adapter_parameters=parameters))

    def memory_bytes(
        self, first_block: Integers, tokens: float, *, open_: int, head: bool
    ) -> Array:
        """The whole program with blocks from ``first_block`` on and ``open_`` micro-batches."""
        if self.own is None:
            return np.zeros(np.shape(first_block))
        needed = self.own.peak_bytes(
            blocks=self.block_count - first_block,
            tokens=tokens,
            adapter_parameters=self.parameters[first_block],
            in_flight=open_,
            head_tokens=tokens if head else 0,
        )
        return np.asarray(needed + self.residual_bytes[first_block], dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCosts:
    """What a part costs on a device, or on many: then every number is an array.

    Lengths in tokens, as of `DataShape`; ``hidden_bytes``: of one token on the wire. ``head``:
    it is here (`labels: device`). ``classifies``: it reads one token of a sequence, and no more
    than that is sent to it and back.
    """

    own: Costs
    slowdown: Numbers
    mean_length: Numbers
    padded_length: Numbers
    longest: Numbers
    uplink_bytes_per_s: Numbers
    downlink_bytes_per_s: Numbers
    round_trip_s: Numbers
    block_count: int
    hidden_bytes: int
    head: bool
    classifies: bool = False

    def memory_bytes(self, cut: Cut, micro_batch: Integers, *, at_once: Integers) -> Array:
        """The whole program with ``at_once`` of the longest micro-batches, and `SPARE`."""
        tokens = micro_batch * self.longest
        needed = self.own.peak_bytes(
            blocks=cut.split_layer,
            tokens=tokens,
            adapter_parameters=cut.parameters,
            in_flight=np.where(self.is_alone(cut.split_layer), 1, at_once),
            head_tokens=tokens if self.head else 0,
        )
        return np.asarray((1 + SPARE) * (needed + cut.residual_bytes), dtype=np.float64)

    def is_alone(self, split_layer: Integers) -> npt.NDArray[np.bool_]:
        """Whether a device with this split layer holds all there is, and exchanges nothing."""
        return np.asarray(self.head & (np.asarray(split_layer) == self.block_count))


def stages(device: DeviceCosts, server: ServerCosts, cut: Cut, sequences: Numbers) -> Stages:
    """Return the stages of one micro-batch of ``sequences`` sequences (the mean of several)."""
    there = ~device.is_alone(cut.split_layer)
    tokens = sequences * device.mean_length
    compute, at_server = _computed(device, server, cut, sequences)
    labels = 0 if device.head else LABEL_BYTES
    up = there * (tokens * (device.hidden_bytes + labels) / device.uplink_bytes_per_s)
    down = there * (tokens * device.hidden_bytes / device.downlink_bytes_per_s)
    read = sequences if device.classifies else tokens
    head_up = there * (read * device.hidden_bytes / device.uplink_bytes_per_s)
    head_down = there * (read * device.hidden_bytes / device.downlink_bytes_per_s)
    optimizer_s = device.own.optimizer_s(adapter_parameters=cut.parameters)
    return Stages(
        compute=compute,
        up=(up, head_up) if device.head else (up,),
        server=tuple(there * seconds for seconds in at_server),
        down=(head_down, down) if device.head else (down,),
        latency_s=there * device.round_trip_s / 2,
        optimizer_s=device.slowdown * optimizer_s,
    )


def _computed(
    device: DeviceCosts, server: ServerCosts, cut: Cut, sequences: Numbers
) -> tuple[tuple[Numbers, ...], tuple[Numbers, ...]]:
    """Return what the device computes before, between and after, and the server in between."""
    padded, tokens = sequences * device.padded_length, sequences * device.mean_length
    forward, backward = (
        device.slowdown
        * seconds(blocks=cut.split_layer, tokens=padded, adapter_parameters=cut.parameters)
        for seconds in (device.own.forward_s, device.own.backward_s)
    )
    there, back = server.forward_s(cut, padded), server.backward_s(cut, padded)
    if device.head:
        head = device.slowdown * device.own.head_s(tokens=tokens)
        return (forward, head, backward), (there, back)
    return (forward, backward), (there + server.head_s(tokens) + back,)


def added(parts: tuple[Numbers, ...]) -> Numbers:
    """Return the sum over a micro-batch's stages of one kind."""
    return functools.reduce(lambda one, other: one + other, parts)
