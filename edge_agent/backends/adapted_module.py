"""One frozen linear module in numpy with its adapter: what a graph is given for it.

Shape suffixes: I input features, O output features (C some of them), R rank, F rank of the
residual.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edge_agent.backends.frozen_weights import FrozenWeight
from shared.adapters import Array, LoraPair, ModuleAdapter, check_adapter
from shared.errors import ProtocolError
from shared.int8_weights import Int8Weight

Array32 = npt.NDArray[np.float32]


class AdaptedModule:
    """W, the residual F_B F_A that a hand-back left, and the pair s B A that is trained.

    The pair's arrays are updated in place by whoever optimises them. The residual is held as
    factors, or in a second weight where that is no larger; the base stays as it is, for the next
    hand-back is on top of it. A base in 8 bits has no second weight beside it: the residual, which
    is smaller than its steps, stays in factors.
    """

    def __init__(self, weight: FrozenWeight, *, inputs_first: bool) -> None:
        """Start without an adapter; ``weight`` is (I, O) with ``inputs_first``, else (O, I)."""
        self._base = weight
        self._inputs_first = inputs_first
        self.weight = weight
        self._forget()

    @property
    def features(self) -> tuple[int, int]:
        """(in, out)."""
        rows, columns = self._base.shape
        return (rows, columns) if self._inputs_first else (columns, rows)

    @property
    def rank(self) -> int:
        """Of the trained pair; 0: nothing is trained."""
        return int(self.a_RI.shape[0])

    def check(self, name: str, adapter: ModuleAdapter, *, fold: bool) -> None:
        """Check that ``adapter`` fits, and can be folded if it is to be.

        Raises:
            NumericsError: as `check_adapter`.
            ProtocolError: a residual is to be folded into a base in 8 bits.
        """
        check_adapter(name, adapter, features=self.features)
        if fold and adapter.frozen is not None and isinstance(self._base, Int8Weight):
            raise ProtocolError(
                f"{name} is held in 8 bits: nothing can be folded into it (merge hand-back)"
            )

    def replace(self, adapter: ModuleAdapter, *, fold: bool) -> None:
        """Hold a checked adapter instead; with ``fold`` its residual goes into the base."""
        frozen = adapter.frozen
        if fold and frozen is not None:
            self._base, frozen = self._with_residual(self._floats, frozen), None
        self.weight = self._base
        self._forget()
        trainable = adapter.trainable
        if trainable.rank:
            self.a_RI = _own(trainable.a_RI)
            self.b_OR = _own(trainable.b_OR)
            self.scaling = trainable.scaling
        if frozen is not None and frozen.rank:
            self._hold(frozen)

    def pair(self) -> LoraPair:
        """Return a copy of the trained pair, float32."""
        return LoraPair(self.a_RI.copy(), self.b_OR.copy(), self.scaling)

    def trained(self) -> Mapping[str, Array32]:
        """Return what every step changes, as a graph's inputs by the first part of their names."""
        return {"a": self.a_RI, "b": self.b_OR}

    def fixed(self) -> Mapping[str, Array32]:
        """Return the adapter's other inputs, which only `replace` changes."""
        return {
            "scaling": np.array(self.scaling, dtype=np.float32),
            "frozen_a": self.frozen_a_FI,
            "frozen_b": self.frozen_b_OF,
        }

    def effective_CI(self, chunk: slice) -> Array32:
        """Return rows ``chunk`` of W + F_B F_A + s B A."""
        found_CI = self._weight_CI(chunk) + self.frozen_b_OF[chunk] @ self.frozen_a_FI
        found_CI += (self.b_OR[chunk] * np.float32(self.scaling)) @ self.a_RI
        return found_CI

    def _weight_CI(self, chunk: slice) -> Array32:
        weight = self.weight
        if not isinstance(weight, Int8Weight):
            return weight.T[chunk] if self._inputs_first else weight[chunk]
        if self._inputs_first:
            return Int8Weight(weight.values[:, chunk], weight.scale[:, chunk]).dequantised().T
        return Int8Weight(weight.values[chunk], weight.scale[chunk]).dequantised()

    @property
    def _floats(self) -> Array32:
        """The base, which is not in 8 bits: `check` came before."""
        if isinstance(self._base, Int8Weight):
            raise TypeError("a base in 8 bits cannot be changed")
        return self._base

    def _forget(self) -> None:
        features_in, features_out = self.features
        self.a_RI = np.zeros((0, features_in), dtype=np.float32)
        self.b_OR = np.zeros((features_out, 0), dtype=np.float32)
        self.scaling = 1.0
        self.frozen_a_FI = self.a_RI
        self.frozen_b_OF = self.b_OR

    def _hold(self, frozen: LoraPair) -> None:
        base = self._base
        if not isinstance(base, Int8Weight) and frozen.rank * sum(base.shape) >= base.size:
            self.weight = self._with_residual(base, frozen)
            return
        self.frozen_a_FI = _own(frozen.a_RI)
        self.frozen_b_OF = _own(frozen.b_OR)
        self.frozen_b_OF *= np.float32(frozen.scaling)

    def _with_residual(self, base: Array32, frozen: LoraPair) -> Array32:
        delta_OI = _own(frozen.b_OR) @ _own(frozen.a_RI)
        delta_OI *= np.float32(frozen.scaling)
        added = base + (delta_OI.T if self._inputs_first else delta_OI)
        return np.ascontiguousarray(added, dtype=np.float32)


def _own(array: Array) -> Array32:
    return np.array(array, dtype=np.float32, order="C")
