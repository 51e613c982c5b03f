"""Seconds and bytes of any part of the work, from a few measured points. Pure.

Every cost is a sum of terms that can only grow with what there is to do:

    forward, backward   c0 + c1 N + L (c2 + c3 N) + c4 P N
    head                h0 + h1 N
    optimizer           o0 + o1 P
    peak memory         runtime + m0 + m1 L + b P + F m3 L N + max(m2 N, e0 + e1 H)

Symbols: L blocks, N tokens of a micro-batch (padding included), P adapter parameters in all L
blocks together, F micro-batches in flight, H tokens at the head (no head term where H = 0).
m0: embeddings, and a head's weights where it is held; m1: one block's weights; m3: what one block
keeps of one token until its backward pass; m2: what is needed only for a moment, by one
micro-batch at a time; e: the same of the head, which is at work when the blocks are not. b = 16
bytes: value, gradient and AdamW's two moments in float32, known and not measured.

The letters are fitted to be 0 or more and to make the points' errors, each relative to its own
value, least in their squares: a device with one slow outlier is not judged by that alone.

What is *not* in here: a residual that a hand-back leaves in a layer (as large as the layer's own
weights at the most), and messages on their way, which are small beside what blocks keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import PlanError
from shared.nonnegative import nonnegative_least_squares
from shared.protocol.profile import BlockPoint, Measurements

Amount: TypeAlias = float | npt.NDArray[Any]
"""A number, or numbers that broadcast against the other arguments'."""
Vector: TypeAlias = npt.NDArray[np.float64]

HELD_BYTES_PER_PARAMETER = 8
"""An adapter's value and gradient: what a measured point has of it."""
BYTES_PER_PARAMETER = 16
"""The same with AdamW's two moments: what training has."""

LEAST_SHARE_OF_RUNTIME = 0.5
"""A little less than the runtime is no contradiction: a short system drops pages of libraries."""

# How dear each term is where the points do not tell it from another: the cheapest gets all. A
# single number of tokens or blocks then makes a cost proportional to it, and not constant.
_TIME_PRICES = (1e3, 30.0, 30.0, 1.0, 100.0)
_LINE_PRICES = (30.0, 1.0)
_MEMORY_PRICES = (10.0, 1.0, 30.0, 3.0)


@dataclass(frozen=True, slots=True)
class _Time:
    """c0 … c4 of the module's formula, in seconds."""

    once: float
    per_token: float
    per_block: float
    per_block_token: float
    per_parameter_token: float

    def __call__(self, blocks: Amount, tokens: Amount, parameters: Amount) -> Amount:
        fixed = self.once + self.per_token * tokens
        in_blocks = blocks * (self.per_block + self.per_block_token * tokens)
        return fixed + in_blocks + self.per_parameter_token * parameters * tokens


@dataclass(frozen=True, slots=True)
class _Line:
    """h0, h1 and their like."""

    once: float
    per_unit: float

    def __call__(self, units: Amount) -> Amount:
        return self.once + self.per_unit * units


@dataclass(frozen=True, slots=True)
class _Memory:
    """m0 … m3 of the module's formula, in bytes; ``once`` has the runtime in it."""

    once: float
    per_block: float
    per_token: float
    per_block_token: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What one program's work costs; see the module. Made by `fit`.

    Arguments are numbers or arrays that broadcast. ``blocks`` 0 or more; ``tokens`` of one
    micro-batch with its padding; ``adapter_parameters`` in all these blocks together.
    """

    _forward: _Time
    _backward: _Time
    _head: _Line
    _optimizer: _Line
    _memory: _Memory
    _head_bytes: _Line

    def forward_s(self, *, blocks: Amount, tokens: Amount, adapter_parameters: Amount) -> Amount:
        """Return the seconds of one micro-batch's training forward pass."""
        return self._forward(blocks, tokens, adapter_parameters)

    def backward_s(self, *, blocks: Amount, tokens: Amount, adapter_parameters: Amount) -> Amount:
        """Return the seconds of one micro-batch's backward pass."""
        return self._backward(blocks, tokens, adapter_parameters)

    def head_s(self, *, tokens: Amount) -> Amount:
        """Return the seconds of the loss and its gradient for ``tokens`` tokens with a target.

        0 where no head was measured: it is not here then.
        """
        return self._head(tokens)

    def optimizer_s(self, *, adapter_parameters: Amount) -> Amount:
        """Return the seconds of one optimizer step."""
        return self._optimizer(adapter_parameters)

    def peak_bytes(
        self,
        *,
        blocks: Amount,
        tokens: Amount,
        adapter_parameters: Amount,
        in_flight: Amount,
        head_tokens: Amount,
    ) -> Amount:
        """Return the most memory that the whole program takes while it trains.

        ``in_flight`` micro-batches of ``tokens`` are kept at once; 0: an evaluation, which
        keeps none. ``head_tokens`` 0: the head does no work here.
        """
        memory = self._memory
        held = memory.once + memory.per_block * blocks + BYTES_PER_PARAMETER * adapter_parameters
        kept = in_flight * memory.per_block_token * blocks * tokens
        head = np.where(np.asarray(head_tokens) > 0, self._head_bytes(head_tokens), 0.0)
        passing = np.maximum(memory.per_token * tokens, head)
        total: Amount = held + kept + passing
        return total

    def memory_line(self, *, tokens: Amount) -> tuple[Amount, Amount]:
        """Return bytes at 0 blocks and bytes per block, with one micro-batch and no adapters."""
        memory = self._memory
        per_block = memory.per_block + memory.per_block_token * tokens
        return memory.once + memory.per_token * tokens, per_block


def stacked(costs: Sequence[Costs], *, shape: tuple[int, ...]) -> Costs:
    """Return the costs of many programs as one: every letter an array of ``shape``, (F, 1, …).

    So a fleet of thousands is planned with a few operations on large arrays.
    """
    return Costs(
        *(_stacked([getattr(one, part.name) for one in costs], shape) for part in fields(Costs))
    )


def _stacked(parts: Sequence[Any], shape: tuple[int, ...]) -> Any:
    letters = [field.name for field in fields(parts[0])]
    columns = [np.array([getattr(part, letter) for part in parts]) for letter in letters]
    return type(parts[0])(*(column.reshape(shape) for column in columns))


def fit(measurements: Measurements) -> Costs:
    """Return the costs that agree best with what was measured.

    Terms that the points cannot tell apart are shared out by rule: with a single number of
    tokens (blocks, parameters) a cost is proportional to them.

    Raises:
        PlanError: a point cannot be true: it takes much less memory than the program does before
            it holds a model, or nothing agrees with all of them.
    """
    try:
        return _fit(measurements)
    except np.linalg.LinAlgError as error:
        raise PlanError(f"measurements that cannot be true: {error}; measure again") from error


def _fit(measurements: Measurements) -> Costs:
    points = measurements.blocks
    _check(points, measurements.runtime_bytes)
    shapes = np.array([_shape(point) for point in points])
    seconds = np.array([(point.forward_s, point.backward_s) for point in points])
    heads = measurements.head
    at_head = [point.tokens for point in heads]
    sizes = [point.adapter_parameters for point in measurements.optimizer]
    return Costs(
        _time(shapes, seconds[:, 0]),
        _time(shapes, seconds[:, 1]),
        _line(at_head, [point.seconds for point in heads]),
        _line(sizes, [point.seconds for point in measurements.optimizer]),
        _memory(measurements, shapes),
        _line(at_head, [max(1.0, float(point.extra_bytes)) for point in heads]),
    )


def _shape(point: BlockPoint) -> tuple[float, float, float]:
    return point.blocks, point.sequences * point.length, point.adapter_parameters


def _check(points: tuple[BlockPoint, ...], runtime_bytes: int) -> None:
    least = min(point.peak_bytes for point in points)
    if least < LEAST_SHARE_OF_RUNTIME * runtime_bytes:
        raise PlanError(
            f"measurements that cannot be true: a peak of {least / 2**20:.1f} MiB with a model, "
            f"but {runtime_bytes / 2**20:.1f} MiB without one; measure again (--fresh)"
        )


def _time(shapes: Vector, seconds: Vector) -> _Time:
    blocks, tokens, parameters = shapes.T
    one = np.ones_like(tokens)
    columns = (one, tokens, blocks, blocks * tokens, parameters * tokens)
    return _Time(*_fitted(columns, seconds, _TIME_PRICES))


def _line(units: list[int], values: list[float]) -> _Line:
    if not units:
        return _Line(0.0, 0.0)
    at = np.array(units, dtype=np.float64)
    return _Line(*_fitted((np.ones_like(at), at), np.array(values), _LINE_PRICES))


def _memory(measurements: Measurements, shapes: Vector) -> _Memory:
    blocks, tokens, parameters = shapes.T
    peaks = np.array([point.peak_bytes for point in measurements.blocks], dtype=np.float64)
    known = measurements.runtime_bytes + HELD_BYTES_PER_PARAMETER * parameters
    # What is left to explain; a little at least, so that every point can be weighed by it.
    rest = np.maximum(peaks - known, 1.0)
    in_flight = np.array([point.in_flight for point in measurements.blocks])
    columns = (np.ones_like(tokens), blocks, tokens, in_flight * blocks * tokens)
    once, *others = _fitted(columns, rest, _MEMORY_PRICES)
    return _Memory(measurements.runtime_bytes + once, *others)


def _fitted(columns: tuple[Vector, ...], values: Vector, prices: tuple[float, ...]) -> list[float]:
    """Return the weights of ``columns`` that add up to ``values`` best, each point relative."""
    design = np.stack(columns, axis=1) / values[:, None]
    weights = nonnegative_least_squares(design, np.ones_like(values), np.array(prices))
    return [float(weight) for weight in weights]
