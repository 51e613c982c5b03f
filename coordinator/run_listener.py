"""What may be told of a run as it happens. The base hears it all and does nothing with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from coordinator.registry import Member
from coordinator.rounds import CloseStep, MicroBatchDone, Round
from shared.protocol.messages import DeviceId, RefusalCode, SessionId


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """What the participants of a round start from.

    ``alone``: those that need no server. ``positions``: where each goes on in the order of its
    sequences. ``server_ranks`` by module, of the blocks that the server holds.
    """

    members: Sequence[Member]
    alone: Collection[DeviceId]
    positions: Mapping[DeviceId, int]
    server_ranks: Mapping[str, int]


class RunListener:
    """Is called from the owner's thread; a `StorageError` that it raises ends the run."""

    # --- devices ------------------------------------------------------------------------------

    def joined(self, member: Member) -> None:
        """Hear that a device is in."""

    def turned_away(self, device: DeviceId, session: SessionId, reason: str) -> None:
        """Hear that an agent was refused before it became a member."""

    def refused(self, member: Member, code: RefusalCode, reason: str) -> None:
        """Hear that a request of a member was refused."""

    def gone(self, member: Member, reason: str) -> None:
        """Hear that a device was struck off; only then is it out of the round, too."""

    # --- the open round -----------------------------------------------------------------------

    def round_opened(self, round_: Round, start: Start) -> None:
        """Hear of a round before any of its participants does."""

    def micro_batch(self, done: MicroBatchDone) -> None:
        """Hear that a micro-batch of the open step is in, before the step closes over it."""

    def step_closed(self, close: CloseStep, *, applied: bool) -> None:
        """Hear of a closed step; not ``applied``: the server's adapter stayed as it was."""

    def left_out(self, device: DeviceId, reason: str) -> None:
        """Hear that the round waits no longer for a device that is still a member."""

    def dropped(self, device: DeviceId) -> None:
        """Hear that a participant (or nobody of the round) is lost, for a reason told before."""

    def delivered(self, device: DeviceId) -> None:
        """Hear that the adapters of a participant are in, and are sound."""

    def update_refused(self, device: DeviceId) -> None:
        """Hear that what a participant delivered does not count."""

    def round_void(self, reason: str) -> None:
        """Hear that nothing of the open round counts: it will be repeated."""

    def round_closing(
        self, accepted: Collection[DeviceId], target_tokens: Mapping[DeviceId, int], *, error: float
    ) -> None:
        """Hear what the open round came to, once aggregated and before that is saved.

        ``target_tokens``: the weights that counted; ``error``: relative, of the aggregation.
        """

    def round_closed(self, number: int) -> None:
        """Hear that a round's outcome is in a checkpoint, or that it only evaluated."""
