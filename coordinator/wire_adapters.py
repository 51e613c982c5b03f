"""Adapters to and from their messages."""

from __future__ import annotations

from collections.abc import Iterable

from shared.adapters import AdapterState, HeldAdapters, LoraPair
from shared.errors import NumericsError
from shared.protocol.messages import AdapterTensors
from shared.protocol.tensors import pack, unpack


def from_wire(adapters: Iterable[AdapterTensors]) -> AdapterState:
    """Return the trainable pairs that a device delivered.

    Raises:
        NumericsError: A and B of a module do not belong together, are not float32, or a module
            is named twice.
    """
    pairs: dict[str, LoraPair] = {}
    for adapter in adapters:
        if adapter.module in pairs or {adapter.a.dtype, adapter.b.dtype} != {"float32"}:
            raise NumericsError(
                f"{adapter.module}: one pair in float32 is expected, got {adapter.a.dtype} and "
                f"{adapter.b.dtype}{', again' if adapter.module in pairs else ''}"
            )
        try:
            pairs[adapter.module] = LoraPair(unpack(adapter.a), unpack(adapter.b), adapter.scaling)
        except ValueError as error:
            raise NumericsError(f"{adapter.module}: {error}") from error
    return pairs


def to_wire(held: HeldAdapters) -> tuple[AdapterTensors, ...]:
    """Return what a holder is handed back, in float32."""
    return tuple(
        AdapterTensors(
            module=module,
            a=pack(adapter.trainable.a_RI, "float32"),
            b=pack(adapter.trainable.b_OR, "float32"),
            scaling=adapter.trainable.scaling,
            frozen_a=pack(adapter.frozen.a_RI, "float32") if adapter.frozen else None,
            frozen_b=pack(adapter.frozen.b_OR, "float32") if adapter.frozen else None,
        )
        for module, adapter in held.items()
    )
