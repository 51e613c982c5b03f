"""How long a script computes, waiting for answers left out."""

from __future__ import annotations

from typing import TypeVar

from edge_agent.conversation import Script
from shared.clock import Clock

T = TypeVar("T")


class Stopwatch:
    """Adds up what the scripts that pass through `timed` take between their waits."""

    def __init__(self, clock: Clock) -> None:
        """Start at zero."""
        self._clock = clock
        self.seconds = 0.0

    def timed(self, script: Script[T]) -> Script[T]:
        """Run ``script`` as ``yield from`` would, and add what it takes.

        An error that is thrown at its wait ends it: no script of ours catches one inside a step.
        """
        answer = None
        while True:
            began_s = self._clock.monotonic_s()
            try:
                waiting = next(script) if answer is None else script.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                self.seconds += self._clock.monotonic_s() - began_s
            answer = yield waiting
