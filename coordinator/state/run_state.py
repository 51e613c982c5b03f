"""Writes ``state.sqlite``: which contributions are in a run's adapters, and who gave them.

**The checkpoint is the truth; the database must never say more than it.** A round therefore ends
in three moments, in this order:

1. ``closing`` is committed, durably: all closed steps and contributions of the round, who was
   accepted, late, lost or refused, and the weights of the aggregation;
2. the checkpoint appears (a rename);
3. ``closed`` is committed.

So ``closed`` means that the checkpoint is there, and once a checkpoint is there everything that
went into it stands in the database, after a power cut, too: that is why the first commit is
fsynced, and none of the others need be. What a crash leaves, and what a start that goes on from
the checkpoint of round r makes of it:

========================  ==============================  =======================================
killed                    the database says               the next start
========================  ==============================  =======================================
while a round is open     r+1 open, some steps            begins r+1 again, see below
between 1 and 2           r+1 closing, no checkpoint      begins r+1 again
between 2 and 3           r closing, its checkpoint is    says closed: no other attempt can have
                          there                           made that checkpoint, as none was open
after 3                   r closed                        nothing
========================  ==============================  =======================================

Where a round begins again, one transaction opens the new attempt and makes void, but keeps, all
that was there of this round and of later ones (a checkpoint may be damaged, and the one before it
be used). Not earlier: until then nothing has happened that would contradict it, and an operator
may still bring the damaged checkpoint back. So at any moment a round has one attempt that is not
void, at the most. A killed transaction leaves nothing: SQLite's write-ahead log.

A checkpoint of round r beside a database in which round r is ``open`` can only be an older copy
of the database (or a disk that lied about an fsync): the round is taken for closed, and what
became of its participants for unknown.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

from coordinator import json_lines
from coordinator.planning.device_plan import DevicePlan
from coordinator.registry import Member, Stage
from coordinator.rounds import CloseStep, MicroBatchDone, Round
from coordinator.run_listener import RunListener, Start
from coordinator.state import database, statements
from shared.clock import Clock
from shared.errors import HsplitError, StorageError
from shared.protocol.messages import DeviceId, RefusalCode, SessionId

logger = logging.getLogger(__name__)

COMPLETE: Final = "complete"
LONGEST_REASON: Final = 500
"""Characters of what a device said are kept; its own log has the rest."""
_ENDS_SESSION: Final[Mapping[str, str]] = {"left_out": "left out", "does_not_fit": "refused"}
_FALLS_OUT: Final[Mapping[str, str]] = {
    "bad_numbers": "refused",
    "outlier": "refused",
    "stale": "late",
}

Values: TypeAlias = Mapping[str, Any]


class RunState(RunListener):
    """The record of one run, for the coordinator's next start and everybody who asks.

    Belongs to the owner's thread. Other programs may read the file at any time. Every method
    raises StorageError where the disk is full or broken; what was written before remains.
    """

    def __init__(self, folder: Path, clock: Clock, *, resumed_round: int | None) -> None:
        """Open or make the database of a run's ``folder``, and bring it in line.

        ``resumed_round``: of the checkpoint that the run goes on from; None: from the beginning.

        Raises:
            StorageError: it is damaged, not ours, or cannot be written.
        """
        self._path = folder / database.STATE_FILE
        if resumed_round and not self._path.exists():
            logger.info("%s is made anew: it begins with round %d", self._path, resumed_round + 1)
        self._clock = clock
        self._db = database.opened(self._path)
        self._at: Values = {}
        """The key of the open round; empty between rounds."""
        self._tokens: dict[DeviceId, dict[int, int]] = {}
        """Of the open step: device → micro-batch → target tokens."""
        self._start: int
        try:
            self._bring_in_line(resumed_round)
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> RunState:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close(COMPLETE if error is None else _ending(error))

    def close(self, ending: str) -> None:
        """Note how the coordinator ended, where the disk still takes it, and close the file."""
        sessions = {"outcome": "done" if ending == COMPLETE else "lost", "reason": ending}
        try:
            with contextlib.closing(self._db), self._transaction():
                self._write(statements.END_SESSIONS, sessions)
                self._write(statements.END_START, {"start": self._start, "ending": ending})
        except StorageError as error:
            logger.warning("how the run ended is not recorded: %s", error)

    # --- devices ------------------------------------------------------------------------------

    def joined(self, member: Member) -> None:
        """Note a device, and its profile."""
        with self._transaction():
            self._write(statements.JOIN, {**_who(member), "profile": _json(asdict(member.profile))})

    def turned_away(self, device: DeviceId, session: SessionId, reason: str) -> None:
        """Note a second agent with an id that is in use."""
        values = {"device": device, "session": session, "reason": _short(reason)}
        with self._transaction():
            self._write(statements.TURN_AWAY, values)

    def refused(self, member: Member, code: RefusalCode, reason: str) -> None:
        """Note who is refused for good, and who thereby falls out of the open round."""
        outcome, ends = _FALLS_OUT.get(code), _ENDS_SESSION.get(code)
        with self._transaction():
            if outcome is not None:
                self._fall_out(member.device_id, outcome, reason)
            if ends is not None:
                values = {**_who(member), "outcome": ends, "reason": _short(reason)}
                self._write(statements.END_SESSION, values)

    def gone(self, member: Member, reason: str) -> None:
        """Note that a device is lost, or left when all was done."""
        outcome = "done" if member.stage is Stage.DONE else "lost"
        values = {**_who(member), "outcome": outcome, "reason": _short(reason)}
        with self._transaction():
            self._fall_out(member.device_id, "lost", reason)
            self._write(statements.END_SESSION, values)

    # --- the open round -----------------------------------------------------------------------

    def round_opened(self, round_: Round, start: Start) -> None:
        """Open a new attempt; void what was there of this round and of later ones."""
        values = {
            "round": round_.number,
            "start": self._start,
            "first_step": round_.first_step,
            "end_step": round_.end_step,
            "server_ranks": _json(start.server_ranks),
            "reason": "it began again",
        }
        with self._transaction():
            self._void(values)
            attempt = self._write(statements.OPEN_ROUND, values)
            at = {"round": round_.number, "attempt": attempt}
            for member in start.members:
                self._take_part(at, member, start)
        self._at, self._tokens = at, {}

    def micro_batch(self, done: MicroBatchDone) -> None:
        """Remember a micro-batch until its step closes; nothing is written."""
        self._tokens.setdefault(done.device, {})[done.index] = done.target_tokens

    def step_closed(self, close: CloseStep, *, applied: bool) -> None:
        """Write who contributed what to a step, in one transaction."""
        at = {**self._at, "step": close.step}
        own = {device: self._tokens.get(device, {}) for device in close.devices}
        self._tokens = {}
        with self._transaction():
            self._write(statements.CLOSE_STEP, {**at, "applied": int(applied)})
            for device, tokens in own.items():
                what = {"target_tokens": sum(tokens.values()), "micro_batches": len(tokens)}
                self._write(statements.CONTRIBUTE, {**at, "device": device, **what})

    def left_out(self, device: DeviceId, reason: str) -> None:
        """Note who was too late."""
        with self._transaction():
            self._fall_out(device, "late", reason)

    def dropped(self, device: DeviceId) -> None:
        """Note who is out for no reason that was told before: its part was too much for it."""
        with self._transaction():
            self._fall_out(device, "lost", "it left the round")

    def delivered(self, device: DeviceId) -> None:
        """Note whose adapters are in."""
        with self._transaction():
            self._write(statements.DELIVER, {**self._at, "device": device})
            self._write(statements.DELIVERED, {**self._at, "device": device})

    def update_refused(self, device: DeviceId) -> None:
        """Note whose adapters do not count though they were delivered."""
        with self._transaction():
            self._write(statements.REFUSE_UPDATE, {**self._at, "device": device})

    def round_void(self, reason: str) -> None:
        """Void the open round."""
        with self._transaction():
            self._void({**self._at, "reason": reason})
        self._at = {}

    def round_closing(
        self, accepted: Collection[DeviceId], target_tokens: Mapping[DeviceId, int], *, error: float
    ) -> None:
        """Write, durably, all that the checkpoint to come will rest on."""
        ending = f"{len(accepted)} delivered"
        with self._transaction(durable=True):
            self._write(statements.FORGET, self._at)
            self._write(statements.CLOSE_ROUND, {**self._at, "ending": ending, "error": error})
            for device, tokens in target_tokens.items():
                here = {**self._at, "device": device}
                self._write(statements.COUNT_TOKENS, {**here, "target_tokens": tokens})

    def round_closed(self, number: int) -> None:
        """Confirm a round whose checkpoint is there, or end one that only evaluated."""
        if self._at.get("round") != number:
            return  # the state before the first round
        with self._transaction():
            self._write(statements.CONFIRM_ROUND, self._at)
            if self._write(statements.CLOSE_EVALUATION, self._at) is not None:
                self._write(statements.EVALUATED, self._at)
        self._at = {}

    # --- the inside ---------------------------------------------------------------------------

    def _bring_in_line(self, resumed_round: int | None) -> None:
        known = {"round": resumed_round or 0}
        killed = {"outcome": "lost", "reason": "the coordinator was started again"}
        with self._transaction():
            self._write(statements.END_KILLED_START, {})
            self._write(statements.END_SESSIONS, killed)
            self._write(statements.CLOSE_WHAT_IS_SAVED, known)
            self._write(statements.MISSED_OUTCOMES, known)
            missed = self._write(statements.CLOSE_WHAT_WAS_MISSED, known)
            self._start = self._write(statements.BEGIN_START, {"round": resumed_round})
        if missed is not None:
            logger.warning("%s is older than the checkpoint of round %d", self._path, missed)

    def _take_part(self, at: Values, member: Member, start: Start) -> None:
        assert member.plan is not None  # participants have one
        values = {
            **at,
            **_who(member),
            "plan": self._write(statements.KEEP_PLAN, _plan(member.plan)),
            "alone": int(member.device_id in start.alone),
            "fresh": int(member.fresh),
            "first_sequence": start.positions[member.device_id],
        }
        self._write(statements.TAKE_PART, values)
        self._write(statements.BEGAN, {**_who(member), "measured": _measured(member)})

    def _fall_out(self, device: DeviceId, outcome: str, reason: str) -> None:
        values = {"device": device, "outcome": outcome, "reason": _short(reason)}
        if self._at:
            self._write(statements.FALL_OUT, {**self._at, **values})

    def _void(self, values: Values) -> None:
        self._write(statements.VOID_OUTCOMES, values)
        self._write(statements.VOID_FROM, values)

    def _transaction(self, *, durable: bool = False) -> contextlib.AbstractContextManager[None]:
        return database.transaction(self._db, self._path, durable=durable)

    def _write(self, statement: str, values: Values) -> Any:
        """Carry out one statement, with the time as ``now``; return what it returns, if it does."""
        cursor = self._db.execute(statement, {**values, "now": self._now()})
        row = cursor.fetchone()
        cursor.close()
        return None if row is None else row[0]

    def _now(self) -> str:
        now = datetime.fromtimestamp(self._clock.wall_s(), UTC)
        return now.isoformat(timespec="milliseconds")


def _who(member: Member) -> dict[str, str]:
    return {"device": member.device_id, "session": member.session}


def _measured(member: Member) -> str | None:
    if member.measurements is None:
        return None
    data = None if member.data is None else asdict(member.data)
    return _json({**asdict(member.measurements), "data": data})


def _plan(plan: DevicePlan) -> Values:
    maps = {"ranks": _json(plan.ranks), "scalings": _json(plan.scalings)}
    return {**asdict(plan), **maps}


def _json(value: Any) -> str:
    return json.dumps(json_lines.jsonable(value), allow_nan=False, sort_keys=True)


def _short(reason: str) -> str:
    reason = " ".join(reason.split())
    return reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 1]}…"


def _ending(error: BaseException) -> str:
    if isinstance(error, HsplitError):
        return _short(str(error))
    return f"stopped ({type(error).__name__.strip('_')})"
