"""The loop of the coordinator: what arrives → members, round, trainer → what goes out.

One thread does everything, in turns: take what arrived, look at the clock, carry out one
micro-batch. So no state needs a lock, and a test can drive it with a clock of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from coordinator.assigning import Assigner
from coordinator.attention import AttendedClock, Watch
from coordinator.checkpoints import Checkpoint
from coordinator.exchange import Failed
from coordinator.fleet import Fleet
from coordinator.global_model import GlobalModel
from coordinator.graphs.library import GraphLibrary
from coordinator.lateness import LATE_BEFORE_LIGHTER, Lateness
from coordinator.membership import Membership, StaleRequestError
from coordinator.model_store import ModelStore
from coordinator.outliers import OutlierError, Screening
from coordinator.presence import Presence
from coordinator.quorum import Quorum, Verdict
from coordinator.registry import Member, Stage
from coordinator.reporting import Reporter
from coordinator.round_driver import RoundDriver
from coordinator.round_opening import RoundOpener
from coordinator.run_listener import RunListener
from coordinator.settings import CoordinatorSettings
from coordinator.supplies import Supplies
from shared.architecture import ModelArchitecture
from shared.clock import Clock
from shared.errors import HsplitError, NumericsError, QuorumError, StorageError
from shared.protocol.messages import (
    Activations,
    Call,
    DeviceId,
    EvaluationResult,
    Finished,
    GraphsRequest,
    HiddenGradients,
    JoinRequest,
    Message,
    PieceRequest,
    Prepared,
    Ready,
    Request,
    RoundResult,
)
from shared.protocol.topics import COORDINATOR_STATUS
from shared.transport.base import LinkDown, LinkUp
from shared.transport.link import LinkEvent, MessageLink, Received, StatusSeen, Unreadable

logger = logging.getLogger(__name__)

EVENTS_A_TURN = 1000
MOST_VOID_ROUNDS = 3
RUN_COMPLETE = "the run is complete"


class Coordinator:
    """Runs one run to its end. Belongs to one thread; `turn` until `finished`."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        link: MessageLink,
        clock: Clock,
        store: ModelStore,
        graphs: GraphLibrary,
        architecture: ModelArchitecture,
        model: GlobalModel,
        fleet: Fleet,
        reporter: Reporter,
        screening: Screening,
        lateness: Lateness,
        save_checkpoint: Callable[[Checkpoint], None],
        next_round: int = 1,
        presence: Presence | None = None,
        listener: RunListener | None = None,
    ) -> None:
        """Take a started link and the state to go on from; ``presence``: None if unannounced."""
        self._settings = settings
        self._link = link
        self._clock = attended = AttendedClock(clock)
        self._model = model
        self._fleet = fleet
        self._reporter = reporter
        self._screening = screening
        self._lateness = lateness
        self._save_checkpoint = save_checkpoint
        self._next_round = next_round
        self._presence = presence
        self._void_rounds = 0
        self._driver: RoundDriver | None = None
        self._watch = Watch(attended)
        self._quorum = Quorum(settings.devices, attended.monotonic_s())
        self.finished = False
        self.members = Membership(
            link,
            attended,
            run_id=settings.run_id,
            model=store.describe(),
            terms=(settings.training_terms, settings.lora, settings.optimizer),
            measure_at=fleet.measure_at,
            lost_after_s=settings.devices.lost_after_s,
            on_lost=self._lost,
            listener=listener,
        )
        self._supplies = Supplies(store, graphs, self.members)
        self._assigner = Assigner(
            settings.devices, members=self.members, fleet=fleet, clock=attended
        )
        self._opener = RoundOpener(
            settings,
            architecture,
            model=model,
            fleet=fleet,
            members=self.members,
            reporter=reporter,
            clock=clock,
        )

    @property
    def phase(self) -> str:
        """What the run is doing, in a few words."""
        if self.finished:
            return "finished"
        if self._driver is None:
            return "waiting for devices"
        return f"round {self._driver.round.number}, step {self._driver.round.step}"

    @property
    def idle_s(self) -> float:
        """How long until `turn` has something to do though nothing arrives, in seconds."""
        return self._watch.idle_s

    def turn(self, timeout_s: float) -> bool:
        """Take what arrived, waiting up to ``timeout_s`` where there is no work; do one job.

        Returns whether anything happened.

        Raises:
            QuorumError: too few devices for too long.
            StorageError: a checkpoint cannot be written.
        """
        self._clock.look()
        did = self._work() | self._supplies.turn()
        event = self._link.receive(0.0 if did else timeout_s)
        handled = 0
        while event is not None:
            did = True
            self._handle(event)
            handled += 1
            if handled == EVENTS_A_TURN:
                return did  # nobody may be declared silent before all that came was heard
            event = self._link.receive(0.0)
        passed_s = self._watch.passed_s()
        if passed_s is not None:
            self.members.tick()
            self._leave_out_the_late(passed_s)
        self._close_round_if_over()
        if not self.finished:
            self._assigner.assign_if_due()
            if self._driver is None:
                self._start_round_if_due()
        return did

    # --- what arrives -------------------------------------------------------------------------

    def _handle(self, event: LinkEvent) -> None:
        self._watch.arrived()
        if isinstance(event, Received):
            self._handle_message(event.address.device, event.message)
        elif isinstance(event, StatusSeen):
            self._handle_status(event)
        elif isinstance(event, Unreadable):
            self.members.handle_unreadable(event)
        elif isinstance(event, LinkDown):
            logger.warning("link to the broker lost (%s), reconnecting", event.reason)
            self._watch.link_is_up = False
        elif isinstance(event, LinkUp):
            self._watch.link_is_up = True
            self._quorum.reset(self._clock.monotonic_s())
            self.members.registry.excuse(self._clock.monotonic_s())

    def _handle_status(self, event: StatusSeen) -> None:
        if event.device is not None:
            self.members.handle_status(event)
        elif self._presence is not None and (again := self._presence.handle(event.payload)):
            self._link.announce(COORDINATOR_STATUS, again)

    def _handle_message(self, device: DeviceId, message: Message) -> None:
        if isinstance(message, JoinRequest) or not isinstance(message, Request):
            self.members.handle_other(device, message)
            return
        member = self.members.member_of(device, message.call.session)
        if member is None:
            return
        try:
            if member.book.admit(message.call):
                self._carry_out(member, message)
        except StorageError:
            raise  # our own disk is the trouble, and no fault of this device
        except HsplitError as error:
            self._refuse(member, message.call, error, what=message.type)

    def _refuse(self, member: Member, call: Call, error: HsplitError, *, what: str) -> None:
        code = self.members.refuse(member, call, error, what=what)
        if isinstance(error, NumericsError) and not isinstance(error, OutlierError):
            self._screening.offended(member.device_id)
        if code in ("stale", "outlier", "bad_numbers"):
            self._set_back(member)  # what it sends else of this round would be in vain
        elif code == "left_out":
            self.members.lose(member, "its updates were refused too often")

    def _carry_out(self, member: Member, request: Request) -> None:
        if isinstance(request, (PieceRequest, GraphsRequest)):
            self._supplies.serve(member, request)
            return
        self._screening.check(member.device_id)
        if isinstance(request, Ready):
            self._ready(member, request)
        elif isinstance(request, Prepared):
            self._assigner.prepared(member, request)
        elif self._driver is None:
            raise StaleRequestError("no round is open")
        elif isinstance(request, (Activations, HiddenGradients)):
            self._driver.submit(member, request)
        elif isinstance(request, EvaluationResult):
            self._driver.evaluated(member, request)
        elif isinstance(request, RoundResult):
            self._deliver(self._driver, member, request)

    def _deliver(self, driver: RoundDriver, member: Member, result: RoundResult) -> None:
        driver.delivered(member, result)
        member.waiting = result.call
        member.stage = Stage.PREPARED

    # --- getting ready ------------------------------------------------------------------------

    def _ready(self, member: Member, request: Ready) -> None:
        if self.finished:
            self.members.answer(member, Finished(call=request.call, reason=RUN_COMPLETE))
        elif member.stage is Stage.DONE:
            member.waiting = request.call
            if request.overloaded is not None:
                self._lost(member)  # nobody waits for its evaluation any more
        else:
            if request.overloaded is not None:
                self._set_back(member, but=request.call)
            member.fresh = True
            self._assigner.ready(member, request)

    def _start_round_if_due(self) -> None:
        if not self._watch.link_is_up:
            return
        if self._assigner.is_changing:
            self._quorum.reset(self._clock.monotonic_s())
            return
        prepared = [m for m in self.members.registry if m.stage is Stage.PREPARED]
        on_their_way = [m.asked_s for m in self.members.registry if m.stage is Stage.PREPARING]
        # The evaluation after the last round takes whoever is there.
        least = 1 if self._is_trained else self._settings.devices.min
        in_time = [
            m for m in prepared if not self._lateness.sits_out(m.device_id, self._next_round)
        ]
        ready = prepared if len(in_time) < least else in_time
        now = self._clock.monotonic_s()
        if self._supplies.is_awaited:
            self._quorum.bear(now)
        verdict = self._quorum.judge(len(ready), on_their_way=on_their_way, least=least, now_s=now)
        if verdict is Verdict.START:
            self._start_round(ready)
        elif verdict is Verdict.GIVE_UP:
            self._give_up(len(ready), least)

    @property
    def _is_trained(self) -> bool:
        return self._next_round > self._settings.rounds.count

    def _give_up(self, prepared: int, least: int) -> None:
        if self._is_trained:
            logger.warning("nobody is left to evaluate the outcome of the last round")
            self._reporter.not_evaluated()
            self._finish()
            return
        raise self._quorum.too_few(prepared, least=least)

    # --- rounds -------------------------------------------------------------------------------

    def _start_round(self, members: Sequence[Member]) -> None:
        opened = self._opener.open(self._next_round, members)
        self._driver = opened.driver
        if self._next_round == 1:
            self._save(round_=0)
        self._opener.start(opened, members)

    def _work(self) -> bool:
        did = self._driver is not None and self._driver.work()
        if isinstance(did, Failed):
            self._refuse(did.member, did.job.call, did.error, what=did.job.type)
        return bool(did)

    def _close_round_if_over(self) -> None:
        driver = self._driver
        if driver is None or driver.outcome is None:
            return
        self._driver = None
        self._quorum.reset(self._clock.monotonic_s())
        if driver.round.number > self._settings.rounds.count:
            self._finish()
        elif not driver.outcome.delivered:
            self._repeat_round(driver.round.number)
        else:
            self._void_rounds = 0
            self._lateness.delivered(driver.outcome.delivered)
            self._screen(driver)
            driver.aggregate()
            self._next_round += 1
            end = driver.round.end_step
            if self._fleet.observe(driver.observations()):
                self._reporter.weighed(driver.round.number, end, self._fleet.importance.scores)
            steps_left = self._settings.total_steps - end
            self._assigner.rearrange(round_=driver.round.number, steps_left=steps_left)
            # The next round may have to wait for devices, and this one must outlive that.
            self._save(round_=driver.round.number)

    def _screen(self, driver: RoundDriver) -> None:
        """Leave outliers out of the round, and tell those who sent them: now, or when they ask."""
        for device, reason in self._screening.judge(driver.sizes()).items():
            driver.refuse(device)
            self._screening.owe(device, reason)
            member = self.members.registry.get(device)
            if member is None or member.waiting is None:
                logger.warning("%s: its update is refused: %s", device, reason)
                continue
            try:
                self._screening.check(device)
            except HsplitError as error:
                self._refuse(member, member.waiting, error, what="update")

    def _repeat_round(self, number: int) -> None:
        self._void_rounds += 1
        if self._void_rounds == MOST_VOID_ROUNDS:
            raise QuorumError(
                f"round {number} lost every device {MOST_VOID_ROUNDS} times in a row: see the "
                "agents' logs; --resume goes on from the round before"
            )
        logger.warning("round %d: every device was lost, it is repeated", number)
        self._model.void_round()
        self._reporter.round_void((number - 1) * self._settings.rounds.steps)

    def _save(self, *, round_: int) -> None:
        step = round_ * self._settings.rounds.steps
        parts = (self._reporter, self._fleet, self._screening, self._lateness)
        state = {name: value for part in parts for name, value in part.state().items()}
        self._save_checkpoint(self._model.checkpoint(round_=round_, step=step, state=state))
        self.members.listener.round_closed(round_)

    def _finish(self) -> None:
        self.finished = True
        self._supplies.finish(RUN_COMPLETE)
        for member in self.members.registry:
            if member.waiting is not None:
                self.members.answer(member, Finished(call=member.waiting, reason=RUN_COMPLETE))
                member.waiting = None

    # --- losing devices -----------------------------------------------------------------------

    def _lost(self, member: Member) -> None:
        if self._driver is not None:
            self._driver.lose(member)

    def _set_back(self, member: Member, *, but: Call | None = None) -> None:
        """Leave a member out of the open round (the next may have it), its calls ``but`` one."""
        self._lost(member)
        self.members.set_back(member, but=but)

    def _leave_out_the_late(self, passed_s: float) -> None:
        driver = self._driver
        if driver is None:
            return
        for late in driver.tick(passed_s, active=self.members.active(passed_s)):
            times = self._lateness.late(late.device, driver.round.number)
            reason = f"left out after {late.waited_s:.0f} s ({times} times in a row)"
            logger.warning("%s is late: %s", late.device, reason)
            member = self.members.registry.get(late.device)
            if member is not None and times == LATE_BEFORE_LIGHTER:
                self._fleet.lighten(member)
            if member is not None:
                self._set_back(member)
