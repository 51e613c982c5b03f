"""Which rank each module gets: the same adapter parameters, where the weights matter. Pure.

    raise the rank with the largest  Ī(W) [g(r⁺) − g(r)] / Δmemory,   g(r) = log2(1 + r)

Symbols: Ī(W) importance of weight W, r its rank, r⁺ the next of the ladder, Δmemory what that
costs in adapter parameters. g grows ever more slowly, so a rank of 64 must be worth it. The rule
is *ours*: the optimisation problem of arXiv:2505.02795 (ARMSC) could not be read.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from shared.architecture import Features

Step: TypeAlias = tuple[int, int]
"""From one rank of the ladder to the next."""

LADDER = (0, 2, 4, 8, 16, 32, 64)
"""Ranks that are given."""


def ranks_by_importance(
    importance: Mapping[str, float],
    features: Mapping[str, Features],
    *,
    budget_parameters: int,
) -> dict[str, int]:
    """Return the rank of every module of ``features``, of `LADDER`; together they keep the budget.

    A module's rank never exceeds the smaller side of its weight. One whose importance is not
    known counts as much as the mean of those that are. What is left of the budget where the best
    step no longer fits goes to the next best that does.

    ``importance`` and ``features`` by full module path.
    """
    scores = _scores(importance, features)
    ranks = dict.fromkeys(features, 0)
    offers = [
        _Offer.of(module, steps, score=scores[module], features=features[module])
        for module in features
        if (steps := _steps(features[module])) and scores[module] > 0
    ]
    heapq.heapify(offers)
    left = budget_parameters
    while offers:
        offer = heapq.heappop(offers)
        if offer.parameters > left:
            continue  # and no larger rank of this module fits either
        left -= offer.parameters
        module = offer.module
        ranks[module] = offer.steps[0][1]
        if len(offer.steps) > 1:
            steps, score = offer.steps[1:], scores[module]
            again = _Offer.of(module, steps, score=score, features=features[module])
            heapq.heappush(offers, again)
    return ranks


@dataclass(frozen=True, slots=True, order=True)
class _Offer:
    """The next step of a module's rank; what sorts first brings most for its memory."""

    loss: float
    module: str
    parameters: int
    steps: tuple[Step, ...]

    @classmethod
    def of(
        cls, module: str, steps: tuple[Step, ...], *, score: float, features: Features
    ) -> _Offer:
        before, after = steps[0]
        parameters = (after - before) * sum(features)
        gain = math.log2(1 + after) - math.log2(1 + before)
        return cls(-score * gain / parameters, module, parameters, steps)


def _scores(
    importance: Mapping[str, float], features: Mapping[str, Features]
) -> Mapping[str, float]:
    known = [importance[module] for module in features if module in importance]
    mean = sum(known) / len(known) if known else 1.0
    return {module: importance.get(module, mean) for module in features}


def _steps(features: Features) -> tuple[Step, ...]:
    return tuple(itertools.pairwise(rank for rank in LADDER if rank <= min(features)))
