"""The shortest step of a fleet, by branch and bound over how long a device may take. Pure.

Given a limit on every device's own step, an allocation finds the least work for the server; that
falls as the limit rises, and the fleet's step grows with both. So between limits a < b no plan
is better than (a, the server's work at b), and whole intervals need no look.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

MOST_TRIES = 100


@dataclass(frozen=True, slots=True)
class Allocation:
    """Who takes which of its options, with how many sequences, in the order of the devices.

    ``longest_s``: the longest step of a device by itself; ``server_s``: the server's work in all.
    """

    longest_s: float
    server_s: float
    choices: tuple[tuple[int, int], ...]


Allocate: TypeAlias = Callable[[float], Allocation | None]
"""Seconds that a device's step may take → the allocation with the least work for the server."""

Objective: TypeAlias = Callable[[float, float], float]
"""(longest step of a device, the server's work) → step of the fleet; grows with both."""


def shortest_steps(
    allocate: Allocate, objective: Objective, *, least_s: float, tolerance: float
) -> list[Allocation]:
    """Return what was tried, best first: that is at most 1 + ``tolerance`` times the shortest.

    ``least_s``: the longest device's step is never shorter. Without a limit there must be an
    allocation.
    """
    loosest = allocate(math.inf)
    assert loosest is not None  # the caller has seen to it that everything can be placed
    best_s = objective(loosest.longest_s, loosest.server_s)
    tried = [(best_s, 0, loosest)]
    bound_s = objective(least_s, loosest.server_s)
    waiting = [(bound_s, least_s, loosest.longest_s, loosest.server_s)]
    while waiting and len(tried) < MOST_TRIES:
        bound_s, low_s, high_s, server_s = heapq.heappop(waiting)
        if bound_s * (1 + tolerance) >= best_s:
            break
        middle_s = math.sqrt(low_s * high_s)
        found = allocate(middle_s)
        heapq.heappush(waiting, (objective(middle_s, server_s), middle_s, high_s, server_s))
        if found is None:
            continue
        step_s = objective(found.longest_s, found.server_s)
        tried.append((step_s, len(tried), found))
        best_s = min(best_s, step_s)
        if found.longest_s > low_s:
            limits = (low_s, found.longest_s, found.server_s)
            heapq.heappush(waiting, (objective(low_s, found.server_s), *limits))
    return [found for _, _, found in sorted(tried, key=lambda one: one[:2])]
