"""A classifier's weights to and from their messages."""

from __future__ import annotations

from collections.abc import Iterable

from shared.classifier_weights import ClassifierTensors
from shared.errors import NumericsError
from shared.protocol.message_parts import WeightTensor
from shared.protocol.tensors import pack, unpack


def to_wire(tensors: ClassifierTensors) -> tuple[WeightTensor, ...]:
    """Return weights as they travel, in float32."""
    return tuple(WeightTensor(name=n, data=pack(w, "float32")) for n, w in tensors.items())


def from_wire(weights: Iterable[WeightTensor]) -> ClassifierTensors:
    """Return the weights that came, by name; whether they belong to a classifier is not checked.

    Raises:
        NumericsError: one is named twice, or is not float32.
    """
    found = {}
    for one in weights:
        if one.name in found or one.data.dtype != "float32":
            raise NumericsError(
                f"the classifier's {one.name}: expected once, in float32, got {one.data.dtype}"
                f"{', again' if one.name in found else ''}"
            )
        found[one.name] = unpack(one.data)
    return found
