"""LoRA adapters as numpy arrays: what crosses the border between packages and programs.

Shape suffixes: I input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import NumericsError

Array: TypeAlias = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One low-rank update ΔW = scaling · B A of one weight.

    ``a_RI`` float (rank, in), ``b_OR`` float (out, rank), ``scaling`` = lora_alpha / rank.
    A rank of 0 is allowed and stands for "no update".
    """

    a_RI: Array
    b_OR: Array
    scaling: float

    def __post_init__(self) -> None:
        """Raise ValueError unless both factors are matrices of the same rank."""
        if self.a_RI.ndim != 2 or self.b_OR.ndim != 2 or self.a_RI.shape[0] != self.b_OR.shape[1]:
            raise ValueError(
                f"A {self.a_RI.shape} and B {self.b_OR.shape} are not (rank, in) and (out, rank)"
            )

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return int(self.a_RI.shape[0])

    @property
    def size_bytes(self) -> int:
        """Bytes of both factors."""
        return int(self.a_RI.nbytes + self.b_OR.nbytes)

    def delta_OI(self) -> Array:
        """Return the dense ΔW (out, in) in float64. For tests and reports: it is large."""
        return self.scaling * (self.b_OR.astype(np.float64) @ self.a_RI.astype(np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class FactoredDelta:
    """An update ΔW = U S Vᵀ of one weight that is kept factored, its singular values descending.

    ``u_OR`` (out, rank) and ``vt_RI`` (rank, in) have orthonormal columns and rows; all three
    are float64, so that a run's rounds add up without rounding. Rank 0 stands for "no update".
    """

    u_OR: Array
    s_R: Array
    vt_RI: Array

    def __post_init__(self) -> None:
        """Raise ValueError unless the three belong together."""
        rank = self.s_R.shape
        if self.u_OR.shape[1:] != rank or self.vt_RI.shape[:-1] != rank:
            raise ValueError(
                f"U {self.u_OR.shape}, S {rank} and Vt {self.vt_RI.shape} have no common rank"
            )

    @classmethod
    def zero(cls, out_features: int, in_features: int) -> FactoredDelta:
        """Return "no update" of an (out, in) weight."""
        return cls(np.zeros((out_features, 0)), np.zeros(0), np.zeros((0, in_features)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return int(self.u_OR.shape[0]), int(self.vt_RI.shape[1])

    @property
    def rank(self) -> int:
        """How many singular values are kept."""
        return int(self.s_R.shape[0])

    @property
    def norm(self) -> float:
        """The Frobenius norm of ΔW."""
        return float(np.linalg.norm(self.s_R))

    def delta_OI(self) -> Array:
        """Return the dense ΔW (out, in) in float64. For tests and reports: it is large."""
        return (self.u_OR * self.s_R) @ self.vt_RI


@dataclass(frozen=True, slots=True)
class ModuleAdapter:
    """What one side holds for one weight W: W + frozen + trainable.

    ``trainable`` is the pair under training; ``frozen`` (the residual F = G - T of
    ALGORITHMS, scaling 1) takes no gradient and is None where nothing was left over.
    """

    trainable: LoraPair
    frozen: LoraPair | None = None


AdapterState: TypeAlias = Mapping[str, LoraPair]
"""Full module path in the Hugging Face model (``model.layers.3.self_attn.q_proj``) → pair."""

HeldAdapters: TypeAlias = Mapping[str, ModuleAdapter]
"""Full module path → all that a side holds for that module."""


def check_adapter(name: str, adapter: ModuleAdapter, *, features: tuple[int, int]) -> None:
    """Check that an adapter is one for a module with these (in, out) features.

    Raises:
        NumericsError: a factor has the wrong shape or is not finite.
    """
    in_features, out_features = features
    for pair in (adapter.trainable, adapter.frozen):
        if pair is None:
            continue
        if (pair.a_RI.shape[1], pair.b_OR.shape[0]) != features:
            raise NumericsError(
                f"adapter of {name}: A {pair.a_RI.shape} and B {pair.b_OR.shape} do not fit a "
                f"weight with {in_features} inputs and {out_features} outputs"
            )
        if not (np.isfinite(pair.a_RI).all() and np.isfinite(pair.b_OR).all()):
            raise NumericsError(f"adapter of {name} holds NaN or infinity: it was not taken over")
