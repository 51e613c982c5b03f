"""From a function of named tensors to an ONNX model of the same inputs and outputs.

The function may use autograd inside: it is traced on fake tensors (`make_fx`), so what comes out
is a plain graph of ATen operators, gradients included, in which sizes given by name stay open.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
import torch
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

Values: TypeAlias = Mapping[str, torch.Tensor]

_FIRST_EXAMPLE = 37


@dataclass(frozen=True, slots=True)
class Input:
    """One input; a size that stays open is given by a name, and equal names are equal sizes."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    @property
    def open_dims(self) -> tuple[int, ...]:
        """The dimensions whose size stays open."""
        return tuple(i for i, size in enumerate(self.shape) if isinstance(size, str))


@dataclass(frozen=True, slots=True, eq=False)
class Traceable:
    """A function of the tensors ``inputs``, by name, that returns its outputs by name."""

    inputs: Mapping[str, Input]
    compute: Callable[[Values], dict[str, torch.Tensor]]


def to_onnx(function: Traceable, *, opset: int) -> onnx.ModelProto:
    """Return the function as an ONNX model of standard operators only.

    Raises:
        Exception: whatever torch raises where a module does what cannot be traced.
    """
    examples = _examples(function.inputs)
    graph, outputs = _trace(function, examples)
    dynamic = tuple(
        dict.fromkeys(input_.open_dims, torch.export.Dim.DYNAMIC) or None
        for input_ in function.inputs.values()
    )
    with _quiet(), torch.no_grad():
        program = torch.export.export(graph, examples, dynamic_shapes=dynamic)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(function.inputs),
            output_names=outputs,
            opset_version=opset,
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch exported nothing")
    return exported.model_proto


def _trace(
    function: Traceable, examples: tuple[torch.Tensor, ...]
) -> tuple[torch.fx.GraphModule, list[str]]:
    outputs: list[str] = []

    def positional(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = function.compute(dict(zip(function.inputs, arguments, strict=True)))
        outputs[:] = found
        return tuple(found.values())

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(example, symbolic_context=_context(input_))
        for example, input_ in zip(examples, function.inputs.values(), strict=True)
    ]
    with mode:
        traced = make_fx(
            positional,
            tracing_mode="symbolic",
            decomposition_table=_decompositions(),
            _allow_non_fake_inputs=True,
        )(*fakes)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced, outputs


def _context(input_: Input) -> StatelessSymbolicContext[Any, Any]:
    return StatelessSymbolicContext(
        dynamic_sizes=[
            DimDynamic.DYNAMIC if isinstance(size, str) else DimDynamic.STATIC
            for size in input_.shape
        ]
    )


def _examples(inputs: Mapping[str, Input]) -> tuple[torch.Tensor, ...]:
    """Return a tensor for each input, with a prime of its own for each open size.

    Or sizes that are equal by chance would be taken for the same. Nothing looks at the values,
    so the memory of large ones is never touched.
    """
    names = dict.fromkeys(n for one in inputs.values() for n in one.shape if isinstance(n, str))
    sizes = dict(zip(names, _primes(_FIRST_EXAMPLE), strict=False))
    shapes = [[sizes[n] if isinstance(n, str) else n for n in one.shape] for one in inputs.values()]
    return tuple(
        torch.empty(shape, dtype=input_.dtype)
        for shape, input_ in zip(shapes, inputs.values(), strict=True)
    )


def _primes(first: int) -> Iterator[int]:
    number = first
    while True:
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            yield number
        number += 1


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return torch's table, but for SiLU: its own leaves operators that ONNX has no word for."""
    table = dict(core_aten_decompositions())
    table[torch.ops.aten.silu.default] = _silu
    table[torch.ops.aten.silu_backward.default] = _silu_backward
    return table


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _silu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(x)
    return dy * (sigmoid * (1 + x * (1 - sigmoid)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its warnings about itself off the terminal."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
