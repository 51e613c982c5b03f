"""Updates far beyond what others delivered: which they are, and whose have been too often. Pure.

A round's updates are judged together, when all are in, so the order of arrival changes nothing.
An update is refused where its size (`coordinator.update_size`) is above

    median + factor · max(1.4826 MAD, median / 2)

over the round's sizes; where these are fewer than `LEAST_VALUES`, also over those accepted in the
last `ROUNDS_REMEMBERED` rounds (otherwise not: a run's first round moves up to ten times as far as
later ones). MAD is the median distance from the median; 1.4826 MAD estimates a standard deviation
that a minority of outliers cannot move. Honest devices differ by their data and plans even where
most are alike, hence the second term of the maximum. Sizes are not negative, so MAD ≤ median, and
with the default factor of 10 the limit lies between 6 and 16 times the median.

What this cannot see: an update within the limit that points the wrong way; poison where fewer
than `LEAST_VALUES` sizes are known; a change that more than half of a round's devices share (then
nobody is refused, since that may as well be the training itself); slow poison, of which each
round accepts a little; and what reaches the server's part through activations and gradients,
which are checked for finite values only.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shared.errors import NumericsError, RefusedError, StorageError
from shared.protocol.messages import DeviceId

STATE: Final = "outliers"
"""Its key in a checkpoint."""
LEAST_VALUES: Final = 3
ROUNDS_REMEMBERED: Final = 3
MOST_REFUSALS: Final = 3
"""In a row; then a device is left out of the run."""
_DEVIATION_PER_MAD: Final = 1.4826
_LEAST_DEVIATION: Final = 0.5


class OutlierError(NumericsError):
    """An update was far larger than the others'; it was left out of its round."""


class LeftOutError(RefusedError):
    """This device's updates were refused too often; the run goes on without it."""


def limit(sizes: Sequence[float], *, factor: float) -> float | None:
    """Return the size above which an update is an outlier; None where nobody can tell."""
    if len(sizes) < LEAST_VALUES:
        return None
    median = statistics.median(sizes)
    if not median:
        return None
    spread = statistics.median(abs(size - median) for size in sizes)
    return median + factor * max(_DEVIATION_PER_MAD * spread, _LEAST_DEVIATION * median)


def outliers(
    sizes: Mapping[DeviceId, float], before: Sequence[float], *, factor: float
) -> Mapping[DeviceId, str]:
    """Return which of this round's updates are outliers, and why.

    ``before``: sizes that were accepted in recent rounds, for want of more in this one.
    """
    known = [*sizes.values(), *(before if len(sizes) < LEAST_VALUES else ())]
    most = limit(known, factor=factor)
    if most is None:
        return {}
    beyond = {device: size for device, size in sizes.items() if size > most}
    if 2 * len(beyond) > len(sizes):
        return {}
    times = 1 / statistics.median(known)
    return {
        device: f"{size * times:.3g} times the median of {len(known)} updates, at most "
        f"{most * times:.3g} times are taken"
        for device, size in beyond.items()
    }


class Screening:
    """Remembers accepted sizes, and refusals in a row. Belongs to the owner's thread."""

    def __init__(self, factor: float | None) -> None:
        """Start with nothing known; ``factor`` None: nobody is an outlier."""
        self._factor = factor
        self._accepted: list[dict[str, list[float]]] = []
        self._in_a_row: Counter[DeviceId] = Counter()
        self._untold: dict[DeviceId, str] = {}

    def judge(self, sizes: Mapping[DeviceId, Mapping[str, float]]) -> Mapping[DeviceId, str]:
        """Take one round's sizes, by device and by what they are of; return who is refused, why."""
        if self._factor is None:
            self._count(sizes, {})
            return {}
        kinds = sorted({kind for own in sizes.values() for kind in own})
        refused: dict[DeviceId, str] = {}
        for kind in kinds:
            known = [size for one in self._accepted for size in one.get(kind, ())]
            mine = {device: own[kind] for device, own in sizes.items() if kind in own}
            for device, why in outliers(mine, known, factor=self._factor).items():
                refused.setdefault(device, f"the update of this device's {kind} is {why}")
        accepted = [own for device, own in sorted(sizes.items()) if device not in refused]
        self._accepted.append({k: [own[k] for own in accepted if k in own] for k in kinds})
        del self._accepted[:-ROUNDS_REMEMBERED]
        self._count(sizes, refused)
        return refused

    def _count(self, sizes: Mapping[DeviceId, object], refused: Mapping[DeviceId, str]) -> None:
        for device in sizes:
            if device in refused:
                self.offended(device)
            elif not self.is_left_out(device):
                self._in_a_row.pop(device, None)

    def offended(self, device: DeviceId) -> None:
        """Count a refusal: an outlier, or an update that was none at all."""
        self._in_a_row[device] += 1

    def is_left_out(self, device: DeviceId) -> bool:
        """Tell whether a device's updates were refused so often that it is out of the run."""
        return self._in_a_row[device] >= MOST_REFUSALS

    def owe(self, device: DeviceId, reason: str) -> None:
        """Remember to tell a device, which is not there now, why its update was refused."""
        self._untold[device] = reason

    def check(self, device: DeviceId) -> None:
        """Let a device go on unless it has something to hear first.

        Raises:
            LeftOutError: it is out of the run.
            OutlierError: an update of it was refused while it was away; said once.
        """
        if self.is_left_out(device):
            raise LeftOutError(
                f"{MOST_REFUSALS} updates in a row were refused, the run goes on without this "
                "device: look at its data, its learning rate and its memory"
            )
        reason = self._untold.pop(device, None)
        if reason is not None:
            raise OutlierError(reason)

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint must hold for `resume`."""
        return {STATE: {"accepted": self._accepted, "in_a_row": dict(self._in_a_row)}}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            StorageError: it is damaged.
        """
        saved = state.get(STATE)
        if saved is None:
            return  # of a version that did not judge
        try:
            self._accepted = [
                {str(kind): [float(size) for size in sizes] for kind, sizes in one.items()}
                for one in saved["accepted"]
            ]
            in_a_row = {DeviceId(device): int(n) for device, n in saved["in_a_row"].items()}
            self._in_a_row = Counter(in_a_row)
        except (KeyError, TypeError, ArithmeticError, ValueError, AttributeError) as error:
            raise StorageError(f"the checkpoint's verdicts are damaged: {error!r}") from error
