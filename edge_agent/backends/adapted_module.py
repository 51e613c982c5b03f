"""One frozen linear module in numpy with its adapter: what a graph is given for it.

Shape suffixes: I input features, O output features (C some of them), R rank, F rank of the
residual.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shared.adapters import Array, LoraPair, ModuleAdapter, check_adapter

Array32 = npt.NDArray[np.float32]


class AdaptedModule:
    """W, the residual F_B F_A that a hand-back left, and the pair s B A that is trained.

    The pair's arrays are updated in place by whoever optimises them. The residual is held as
    factors, or in a second weight where that is no larger; the base stays as it is, for the next
    hand-back is on top of it.
    """

    def __init__(self, weight: Array32, *, inputs_first: bool) -> None:
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

    def check(self, name: str, adapter: ModuleAdapter) -> None:
        """Check that ``adapter`` fits.

        Raises:
            NumericsError: as `check_adapter`.
        """
        check_adapter(name, adapter, features=self.features)

    def replace(self, adapter: ModuleAdapter, *, fold: bool) -> None:
        """Hold a checked adapter instead; with ``fold`` its residual goes into the base."""
        frozen = adapter.frozen
        if fold and frozen is not None:
            self._base, frozen = self._with_residual(frozen), None
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

    def inputs(self) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return what a graph takes for the adapter, by the first part of its name."""
        return {
            "a": self.a_RI,
            "b": self.b_OR,
            "scaling": np.array(self.scaling, dtype=np.float32),
            "frozen_a": self.frozen_a_FI,
            "frozen_b": self.frozen_b_OF,
        }

    def effective_CI(self, chunk: slice) -> Array32:
        """Return rows ``chunk`` of W + F_B F_A + s B A."""
        weight_OI = self.weight.T if self._inputs_first else self.weight
        found_CI = weight_OI[chunk] + self.frozen_b_OF[chunk] @ self.frozen_a_FI
        found_CI += (self.b_OR[chunk] * np.float32(self.scaling)) @ self.a_RI
        return found_CI

    def _forget(self) -> None:
        features_in, features_out = self.features
        self.a_RI = np.zeros((0, features_in), dtype=np.float32)
        self.b_OR = np.zeros((features_out, 0), dtype=np.float32)
        self.scaling = 1.0
        self.frozen_a_FI = self.a_RI
        self.frozen_b_OF = self.b_OR

    def _hold(self, frozen: LoraPair) -> None:
        if frozen.rank * sum(self._base.shape) >= self._base.size:
            self.weight = self._with_residual(frozen)
            return
        self.frozen_a_FI = _own(frozen.a_RI)
        self.frozen_b_OF = _own(frozen.b_OR)
        self.frozen_b_OF *= np.float32(frozen.scaling)

    def _with_residual(self, frozen: LoraPair) -> Array32:
        delta_OI = _own(frozen.b_OR) @ _own(frozen.a_RI)
        delta_OI *= np.float32(frozen.scaling)
        added = self._base + (delta_OI.T if self._inputs_first else delta_OI)
        return np.ascontiguousarray(added, dtype=np.float32)


def _own(array: Array) -> Array32:
    return np.array(array, dtype=np.float32, order="C")
