"""A classifier's weights as numpy arrays: what crosses the border between packages and programs.

It is new in every run and trained in full, wherever the head is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import NumericsError

ClassifierTensors: TypeAlias = Mapping[str, npt.NDArray[np.floating[Any]]]
"""Weights in float32 by full name in the Hugging Face model (``score.weight``)."""


def check_classifier(tensors: ClassifierTensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that these are all weights of a classifier, in their shapes, and finite.

    Raises:
        NumericsError: one is missing, is none of its weights, has the wrong shape or dtype, or
            is not finite.
    """
    strange = sorted(tensors.keys() ^ shapes.keys())
    if strange:
        raise NumericsError(f"the classifier's weights: {strange[0]} is missing or not among them")
    for name, array in tensors.items():
        if array.shape != shapes[name] or array.dtype != np.float32:
            raise NumericsError(
                f"the classifier's {name}: expected float32{list(shapes[name])}, got "
                f"{array.dtype}{list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise NumericsError(f"the classifier's {name} holds NaN or infinity")
