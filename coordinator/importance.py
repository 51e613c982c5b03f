"""Which weights matter: from what devices and server measured to a score for each module. Pure.

Important weight identification of HSplitLoRA (arXiv:2505.02795), as in ALGORITHMS:

    Θ(W) = Σ_j |w_j ∂L/∂w_j|
    Ī_t(W) = γ_t Ī_{t-1}(W) + (1 - γ_t) Θ_t(W)
    γ_t = 1 - exp(-κ (t/T) / (1 + ν_t)),  ν_t = |Θ_t - Ī_{t-1}| / (Ī_{t-1} + ε),  in [0, 0.99]

Symbols: L the loss per target token of the probe, t/T how much of the run is done. The paper
divides Θ by C(W), the memory that fine-tuning W costs. Here the rule that gives ranks does so,
with the memory of each step of rank (`rank_policy`): memory is to count once (*ours*).

Every probe micro-batch passes through the whole model, so each module, on whichever side it is
for that device, is measured on the same text. How text is cut into micro-batches changes the
level of all scores alike (their gradients cancel less in small ones), hardly their shares.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import NumericsError, ProtocolError, StorageError

KAPPA = 3.0
"""κ (*ours*): at the run's end a score that is stable is 95 % history."""
MOST_HISTORY = 0.99
EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class Measured:
    """Σ_j |w_j ∂L/∂w_j| of one module, for the loss *summed* over this many target tokens.

    The sum is taken micro-batch by micro-batch, each with its own gradient.
    """

    magnitude: float
    target_tokens: int

    def __add__(self, other: Measured) -> Measured:
        """Return the sum over both."""
        return Measured(self.magnitude + other.magnitude, self.target_tokens + other.target_tokens)


def add(one: Mapping[str, Measured], other: Mapping[str, Measured]) -> dict[str, Measured]:
    """Return what two measured together: a module that both measured is weighted by tokens."""
    nothing = Measured(0.0, 0)
    return {name: one.get(name, nothing) + other.get(name, nothing) for name in {**one, **other}}


def from_device(
    magnitudes: Mapping[str, float], target_tokens: int, *, candidates: Collection[str]
) -> dict[str, Measured]:
    """Return what one device reported, checked; ``candidates`` are those in its front.

    Raises:
        ProtocolError: a module is no candidate of this device.
        NumericsError: a value is negative or not finite, or was measured on no tokens.
    """
    unknown = sorted(magnitudes.keys() - set(candidates))
    if unknown:
        raise ProtocolError(f"the importance of {unknown[0]} was not asked of this device")
    for module, value in magnitudes.items():
        if not (math.isfinite(value) and value >= 0.0 and (target_tokens > 0 or value == 0.0)):
            raise NumericsError(
                f"the importance of {module} is {value} over {target_tokens} target tokens"
            )
    return {module: Measured(value, target_tokens) for module, value in magnitudes.items()}


def theta(reports: Iterable[Mapping[str, Measured]]) -> dict[str, float]:
    """Return Θ(W) of every module that was measured on any tokens.

    L is the mean over tokens, whoever measured them.
    """
    total: Mapping[str, Measured] = {}
    for report in reports:
        total = add(total, report)
    return {
        module: one.magnitude / one.target_tokens
        for module, one in total.items()
        if one.target_tokens
    }


@dataclass(frozen=True, slots=True)
class Importance:
    """Ī: the score of each module that was ever measured."""

    scores: Mapping[str, float]

    def updated(self, measured: Mapping[str, float], *, progress: float) -> Importance:
        """Return Ī_t of Ī_{t-1} and Θ_t; ``progress`` is t/T, 0 to 1.

        A module measured for the first time has its own Θ; one not measured keeps its score.

        Raises:
            NumericsError: a Θ is negative or not finite.
        """
        for module, value in measured.items():
            if not (math.isfinite(value) and value >= 0.0):
                raise NumericsError(f"the importance of {module} is {value}")
        moved = {
            module: _moved(self.scores.get(module), value, progress=progress)
            for module, value in measured.items()
        }
        return Importance({**self.scores, **moved})

    def change(self, since: Importance) -> float:
        """Return how much of all importance is elsewhere than it was ``since``: 0 to 1.

        Half of Σ |difference of shares|: what the whole level of the scores does (it falls with
        the loss) is no change of where rank belongs.
        """
        now, then = _shares(self.scores), _shares(since.scores)
        moved = sum(abs(now.get(m, 0.0) - then.get(m, 0.0)) for m in {**now, **then})
        return moved / 2.0 if now and then else float(bool(now) != bool(then))

    def state(self) -> dict[str, Any]:
        """Return it for a checkpoint, as JSON holds it."""
        return {"scores": dict(self.scores)}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Importance:
        """Return what `state` returned.

        Raises:
            StorageError: it is damaged.
        """
        scores = state.get("scores")
        if not isinstance(scores, Mapping):
            raise StorageError("the checkpoint's importance holds no scores")
        for module, score in scores.items():
            if not isinstance(score, int | float) or not math.isfinite(score) or score < 0:
                raise StorageError(f"the checkpoint's importance of {module} is {score!r}")
        return cls({module: float(score) for module, score in scores.items()})


def history_weight(before: float, measured: float, *, progress: float) -> float:
    """Return γ_t: little early or while importance fluctuates, much when late and stable."""
    volatility = abs(measured - before) / (before + EPSILON)
    return min(MOST_HISTORY, 1.0 - math.exp(-KAPPA * progress / (1.0 + volatility)))


def _moved(before: float | None, measured: float, *, progress: float) -> float:
    if before is None:
        return measured
    weight = history_weight(before, measured, progress=progress)
    return weight * before + (1.0 - weight) * measured


def _shares(scores: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(scores.values())
    return {module: score / total for module, score in scores.items()} if total else {}
