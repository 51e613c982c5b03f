"""Adapters to and from their messages."""

from __future__ import annotations

from collections.abc import Iterable

from shared.adapters import AdapterState, HeldAdapters, LoraPair, ModuleAdapter
from shared.protocol.messages import AdapterTensors
from shared.protocol.tensors import pack, unpack


def to_wire(pairs: AdapterState) -> tuple[AdapterTensors, ...]:
    """Return trained pairs as they are delivered, in float32."""
    return tuple(
        AdapterTensors(
            module=module,
            a=pack(pair.a_RI, "float32"),
            b=pack(pair.b_OR, "float32"),
            scaling=pair.scaling,
        )
        for module, pair in pairs.items()
    )


def from_wire(adapters: Iterable[AdapterTensors]) -> HeldAdapters:
    """Return what a hand-back replaces, by module."""
    return {adapter.module: _held(adapter) for adapter in adapters}


def _held(adapter: AdapterTensors) -> ModuleAdapter:
    frozen = None
    if adapter.frozen_a is not None and adapter.frozen_b is not None:
        frozen = LoraPair(unpack(adapter.frozen_a), unpack(adapter.frozen_b), 1.0)
    return ModuleAdapter(LoraPair(unpack(adapter.a), unpack(adapter.b), adapter.scaling), frozen)
