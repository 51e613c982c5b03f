"""Which devices there are, which start of each is the true one, and which are gone.

Pure: time comes in as an argument. A second agent with an id already in use is held until the
first one either speaks (the second is refused) or stays silent (the second takes its place).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.planning.device_plan import DevicePlan
from shared.protocol.calls import AnswerBook
from shared.protocol.messages import Call, DeviceId, DeviceProfile, JoinRequest, SessionId
from shared.protocol.profile import DataShape, Measurements, Telemetry

WILL_GRACE_S = 2.0
"""A broken link that is mended within this time costs the device nothing."""

RECONNECT_S = 10.0
"""The longest that an agent takes to be connected again: a pause, and slow answers of a broker."""

_INSTANCE_DIGITS = 8


class Stage(enum.Enum):
    """How far a member has come."""

    JOINED = "joined"
    READY = "ready"
    PREPARING = "preparing"
    PREPARED = "prepared"
    IN_ROUND = "in round"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Member:
    """One device that is in. ``heard_s``: its last sign of life; ``asked_s``: its last request.

    ``waiting``: the call to answer with a part, the next round, or the end.
    ``fresh``: the device holds no adapters of an earlier hand-back.
    ``changing``: it took part in the last round, and prepares another part for the next,
    since ``changing_s``.
    ``most_blocks``: what it could prepare at most, where it once could not.
    """

    device_id: DeviceId
    session: SessionId
    profile: DeviceProfile
    heard_s: float
    asked_s: float
    book: AnswerBook = field(default_factory=AnswerBook)
    stage: Stage = Stage.JOINED
    plan: DevicePlan | None = None
    plan_version: int = 0
    waiting: Call | None = None
    fresh: bool = True
    changing: bool = False
    changing_s: float = 0.0
    most_blocks: int | None = None
    data: DataShape | None = None
    measurements: Measurements | None = None
    telemetry: Telemetry | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request made a member; ``replaced`` is the start of the device that it took over from."""

    member: Member
    replaced: Member | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """The device id is in use by a member that may be dead; wait for the outcome."""


@dataclass(frozen=True, slots=True)
class Known:
    """This session, or a later one of the same start, is a member: the request is a repeat."""

    member: Member


@dataclass(slots=True)
class _Challenger:
    request: JoinRequest
    since_s: float


class Registry:
    """The members of a run."""

    def __init__(self, *, lost_after_s: float) -> None:
        """Start empty; a member silent for ``lost_after_s`` is lost."""
        self._lost_after_s = lost_after_s
        self._members: dict[DeviceId, Member] = {}
        self._challengers: dict[DeviceId, _Challenger] = {}

    def __iter__(self) -> Iterator[Member]:
        """Iterate over the members, by device id."""
        return iter([self._members[device] for device in sorted(self._members)])

    def __len__(self) -> int:
        """How many members there are."""
        return len(self._members)

    def find(self, device: DeviceId, session: SessionId) -> Member | None:
        """Return the member, if it is this session of the device."""
        member = self._members.get(device)
        return member if member is not None and member.session == session else None

    def get(self, device: DeviceId) -> Member | None:
        """Return the member of this id, whichever start of the device it is."""
        return self._members.get(device)

    def is_held(self, device: DeviceId, session: SessionId) -> bool:
        """Tell whether this session waits for its join request to be decided."""
        challenger = self._challengers.get(device)
        return challenger is not None and challenger.request.call.session == session

    def join(self, device: DeviceId, request: JoinRequest, now_s: float) -> Admitted | Held | Known:
        """Take a join request."""
        session = request.call.session
        old = self._members.get(device)
        if old is None:
            return Admitted(self._admit(device, request, now_s))
        if _instance(old.session) == _instance(session):
            if session <= old.session:
                return Known(old)  # a repeat, or the late request of an earlier life
            return Admitted(self._admit(device, request, now_s), replaced=old)
        if not self.is_held(device, session):
            self._challengers[device] = _Challenger(request, now_s)
        return Held()

    def heard(self, device: DeviceId, session: SessionId, now_s: float) -> JoinRequest | None:
        """Note a sign of life; return the request of a challenger that must now be refused."""
        member = self.find(device, session)
        if member is None:
            return None
        member.heard_s = now_s
        challenger = self._challengers.get(device)
        if challenger is None or now_s <= challenger.since_s:
            return None
        return self._challengers.pop(device).request

    def offline(self, device: DeviceId, instance: str, now_s: float) -> None:
        """Take a death notice: unless the member speaks soon, it is lost."""
        member = self._members.get(device)
        if member is not None and _instance(member.session) == instance:
            member.heard_s = min(member.heard_s, now_s - self._lost_after_s + WILL_GRACE_S)

    def excuse(self, now_s: float) -> None:
        """Count no silence until now against anybody: we could have heard nobody, nor they us."""
        for member in self:
            member.asked_s = member.changing_s = now_s
            member.heard_s = now_s + RECONNECT_S
            member.book.doubt()

    def online(self, device: DeviceId, instance: str) -> bool:
        """Take a birth; tell whether it is a member's, whose connection was made anew."""
        member = self._members.get(device)
        if member is None or _instance(member.session) != instance:
            return False
        member.book.doubt()
        return True

    def lost(self, now_s: float) -> list[Member]:
        """Return the members that were silent for too long; they are members no more."""
        gone = [m for m in self if now_s - m.heard_s >= self._lost_after_s]
        for member in gone:
            self.remove(member)
        return gone

    def remove(self, member: Member) -> None:
        """Strike a member off, unless another start has taken its place."""
        if self._members.get(member.device_id) is member:
            del self._members[member.device_id]

    def admit_challengers(self, now_s: float) -> list[tuple[Member, JoinRequest]]:
        """Admit those who wait for an id that is free by now."""
        free = [device for device in self._challengers if device not in self._members]
        requests = [(device, self._challengers.pop(device).request) for device in free]
        return [(self._admit(device, request, now_s), request) for device, request in requests]

    def _admit(self, device: DeviceId, request: JoinRequest, now_s: float) -> Member:
        member = Member(device, request.call.session, request.profile, now_s, now_s)
        self._members[device] = member
        return member


def _instance(session: SessionId) -> str:
    return session[:_INSTANCE_DIGITS]
