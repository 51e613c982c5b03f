"""Who kept the others waiting, how often in a row, and which rounds go on without it. Pure.

The first time costs a device the rest of its round. The second time in a row its plan is made
lighter (`LATE_BEFORE_LIGHTER`). From the third on it also sits out rounds: 1, 2, 4 … of them, so
that a device which never keeps up costs the others less and less, and one that was only busy is
back soon. A round to which it delivers clears its record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from shared.errors import StorageError
from shared.protocol.messages import DeviceId

STATE: Final = "lateness"
"""Its key in a checkpoint."""
LATE_BEFORE_LIGHTER: Final = 2
MOST_ROUNDS_OUT: Final = 16


class Lateness:
    """Remembers who was late. Belongs to the owner's thread."""

    def __init__(self) -> None:
        """Start with nothing against anybody."""
        self._in_a_row: Counter[DeviceId] = Counter()
        self._out_before: dict[DeviceId, int] = {}

    def late(self, device: DeviceId, round_: int) -> int:
        """Note that ``device`` was left out of round ``round_``; return how often in a row."""
        self._in_a_row[device] += 1
        count = self._in_a_row[device]
        if count > LATE_BEFORE_LIGHTER:
            rounds = min(MOST_ROUNDS_OUT, 2 ** (count - LATE_BEFORE_LIGHTER - 1))
            self._out_before[device] = round_ + 1 + rounds
        return count

    def delivered(self, devices: Iterable[DeviceId]) -> None:
        """Clear the record of devices that saw a round to its end."""
        for device in devices:
            self._in_a_row.pop(device, None)
            self._out_before.pop(device, None)

    def sits_out(self, device: DeviceId, round_: int) -> bool:
        """Tell whether round ``round_`` goes on without ``device``."""
        return round_ < self._out_before.get(device, 0)

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint must hold for `resume`."""
        return {STATE: {"in_a_row": dict(self._in_a_row), "out_before": dict(self._out_before)}}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            StorageError: it is damaged.
        """
        saved = state.get(STATE)
        if saved is None:
            return  # of a version that kept no record
        try:
            self._in_a_row = Counter({DeviceId(d): int(n) for d, n in saved["in_a_row"].items()})
            self._out_before = {DeviceId(d): int(n) for d, n in saved["out_before"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(
                f"the checkpoint's record of delays is damaged: {error!r}"
            ) from error
