"""What a backend remembers between two calls: open micro-batches, a probe, a classifier's counts.

The same for every backend; what is kept of a micro-batch is each one's own matter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from edge_agent.backends.base import MicroBatch
from shared.class_counts import ClassCounts, total
from shared.errors import NumericsError, ProtocolError

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Probe:
    """The modules whose importance is measured, and what it came to so far."""

    modules: tuple[str, ...]
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, sums: Mapping[str, float]) -> None:
        """Add what one more micro-batch came to."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


class OpenWork(Generic[Kept]):
    """Micro-batches that wait for the coordinator's answer, and what they add up to."""

    def __init__(self) -> None:
        """Start with nothing open."""
        self._trained: dict[MicroBatch, Kept] = {}
        self._evaluated: dict[MicroBatch, Kept] = {}
        self._counts: ClassCounts = ()
        self.probe: Probe | None = None

    def keep(self, key: MicroBatch, kept: Kept, *, train: bool) -> None:
        """Leave a micro-batch open."""
        (self._trained if train else self._evaluated)[key] = kept

    def find(self, key: MicroBatch, *, train: bool) -> Kept:
        """Return what is kept of a micro-batch.

        Raises:
            ProtocolError: it is not open.
        """
        open_ = self._trained if train else self._evaluated
        if key not in open_:
            raise ProtocolError(f"micro-batch {key.index} of step {key.step} is not open here")
        return open_[key]

    def close(self, key: MicroBatch, *, train: bool) -> None:
        """Forget a micro-batch that is open."""
        del (self._trained if train else self._evaluated)[key]

    def count(self, counts: ClassCounts) -> None:
        """Add how the classifier chose in one evaluation."""
        self._counts = total((self._counts, counts))

    def take_counts(self) -> ClassCounts:
        """Return the sum since the last time."""
        counts, self._counts = self._counts, ()
        return counts

    def begin_probe(self, modules: Collection[str]) -> None:
        """Measure how much these modules matter from now on.

        Raises:
            ProtocolError: a micro-batch or a probe is open.
        """
        if self._trained or self.probe is not None:
            raise ProtocolError("a probe cannot begin: micro-batches or another probe are open")
        self.probe = Probe(tuple(modules))

    def end_probe(self) -> Mapping[str, float]:
        """Return what the probe came to.

        Raises:
            ProtocolError: a micro-batch is still open, or there is no probe.
        """
        if self._trained or self.probe is None:
            raise ProtocolError("no probe can end: there is none, or its micro-batches are open")
        sums, self.probe = self.probe.sums, None
        return sums

    def discard(self) -> None:
        """Forget everything."""
        self._trained.clear()
        self._evaluated.clear()
        self._counts = ()
        self.probe = None


def finite_loss(loss_sum: float, key: MicroBatch) -> float:
    """Return the summed loss of a micro-batch.

    Raises:
        NumericsError: it is not finite.
    """
    if not math.isfinite(loss_sum):
        raise NumericsError(
            f"the loss of step {key.step}, micro-batch {key.index} is {loss_sum}: training "
            "diverged; lower optimizer.learning_rate"
        )
    return loss_sum
