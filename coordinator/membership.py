"""Who is in: joining, being alive, answering calls, leaving. Knows nothing of training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from coordinator.outliers import LeftOutError, OutlierError
from coordinator.registry import Admitted, Held, Known, Member, Registry, Stage
from coordinator.run_listener import RunListener
from shared.clock import Clock
from shared.errors import HsplitError, NumericsError, PlanError, ProtocolError
from shared.protocol.messages import (
    ActivationGradients,
    Answer,
    Call,
    DeviceId,
    EvaluatedLoss,
    Finished,
    Heartbeat,
    Hidden,
    JoinRequest,
    Leave,
    Message,
    ModelDescription,
    PieceBytes,
    Refusal,
    RefusalCode,
    Rejoin,
    Resend,
    RoundStart,
    RunId,
    SessionId,
    Welcome,
)
from shared.protocol.topics import Topic, device_topic, run_topic
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from shared.transport.link import MessageLink, StatusSeen, Unreadable

logger = logging.getLogger(__name__)

REPEAT_AFTER_S = 5.0


class StaleRequestError(ProtocolError):
    """The request belongs to a round or step that is over, or that this device is not part of."""


_CODES: tuple[tuple[type[HsplitError], RefusalCode], ...] = (
    (StaleRequestError, "stale"),
    (OutlierError, "outlier"),
    (LeftOutError, "left_out"),
    (NumericsError, "bad_numbers"),
    (PlanError, "does_not_fit"),
)


def refusal_code(error: HsplitError) -> RefusalCode:
    """Return how an error is called on the wire."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), "bad_request")


class Membership:
    """Speaks with devices on behalf of a run. Belongs to the owner's thread.

    ``on_lost`` is called with every member that is gone, after it was struck off;
    ``measure_at`` says at which micro-batch a device should measure itself (None: not at all).
    """

    def __init__(
        self,
        link: MessageLink,
        clock: Clock,
        *,
        run_id: RunId,
        model: ModelDescription,
        terms: tuple[TrainingTerms, LoraTerms, OptimizerTerms],
        measure_at: Callable[[DeviceId], int | None],
        lost_after_s: float,
        on_lost: Callable[[Member], None],
        listener: RunListener | None = None,
    ) -> None:
        """Start without members."""
        self._link = link
        self._clock = clock
        self._run_id = run_id
        self._model = model
        self._training, self._lora, self._optimizer = terms
        self._measure_at = measure_at
        self._on_lost = on_lost
        self.listener = listener or RunListener()
        """Hears who comes, is refused and goes."""
        self.registry = Registry(lost_after_s=lost_after_s)

    # --- what arrives -------------------------------------------------------------------------

    def handle_status(self, event: StatusSeen) -> None:
        """Take a birth or death notice; anything else on that topic is ignored."""
        try:
            status = json.loads(event.payload)
            state, instance = str(status["state"]), str(status["instance"])
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.debug("unreadable status of %s", event.device)
            return
        if state == "offline" and event.device is not None:
            self.registry.offline(event.device, instance, self._clock.monotonic_s())
        elif (
            state == "online"
            and event.device is not None
            and self.registry.online(event.device, instance)
        ):
            # What was under way went with the old connection, and would be waited for in vain.
            self._link.forget(event.device)

    def handle_unreadable(self, event: Unreadable) -> None:
        """Tell the sender that its bytes were no message."""
        device = event.address.device
        logger.warning("%s sent something unreadable: %s", device, event.reason)
        code: RefusalCode = "version" if event.version_mismatch else "unreadable"
        self._link.send(device_topic(device, "commands"), Refusal(code=code, reason=event.reason))

    def handle_other(self, device: DeviceId, message: Message) -> None:
        """Take a heartbeat, a goodbye or a join request."""
        if isinstance(message, Heartbeat):
            self._heartbeat(device, message)
        elif isinstance(message, Leave):
            member = self.registry.find(device, message.session)
            if member is not None:
                self.lose(member, message.reason or "it left")
        elif isinstance(message, JoinRequest):
            self._join(device, message)
        else:
            logger.warning("%s sent a %s, which only a coordinator may", device, message.type)

    def tick(self) -> None:
        """Strike off the silent; let in those who wait for their place."""
        now = self._clock.monotonic_s()
        for member in self.registry.lost(now):
            self._gone(member, "it fell silent")
        for member, request in self.registry.admit_challengers(now):
            self._welcome(member, request)

    def member_of(self, device: DeviceId, session: SessionId) -> Member | None:
        """Return the member behind a request; a session that is unknown is told to join again."""
        member = self.registry.find(device, session)
        if member is None:
            self._link.send(device_topic(device, "commands"), Rejoin(session=session))
        else:
            # That does not decide against another agent with this id: it may have been on its way
            # since before this one died. A heartbeat does.
            member.heard_s = member.asked_s = self._clock.monotonic_s()
        return member

    def await_request(self, member: Member) -> None:
        """Count from now on for how long this member asks nothing."""
        member.asked_s = self._clock.monotonic_s()

    def active(self, within_s: float) -> frozenset[DeviceId]:
        """Return whose request came in the last ``within_s`` s, or whose link is busy."""
        since_s = self._clock.monotonic_s() - within_s
        return frozenset(
            member.device_id
            for member in self.registry
            if member.asked_s >= since_s
            or self._link.sending_to(member.device_id)
            or self._link.receiving_from(member.device_id, within_s=REPEAT_AFTER_S)
        )

    # --- what goes out ------------------------------------------------------------------------

    def answer(self, member: Member, answer: Answer) -> None:
        """Give a call its answer, unless the call is no longer pending or the member is gone."""
        assert answer.call is not None  # answers to calls only
        if not member.book.is_pending(answer.call):
            return
        if isinstance(answer, Refusal):
            self.listener.refused(member, answer.code, answer.reason)
        topic = self._topic(member.device_id, answer)
        member.book.answer(topic, answer, self._clock.monotonic_s())
        self._link.send(topic, answer)

    def refuse(self, member: Member, call: Call, error: HsplitError, *, what: str) -> RefusalCode:
        """Say why a call cannot be carried out; return what that is called on the wire."""
        code = refusal_code(error)
        level = logging.INFO if code == "stale" else logging.WARNING
        logger.log(level, "%s: %s refused: %s", member.device_id, what, error)
        self.answer(member, Refusal(call=call, code=code, reason=str(error)[:4000]))
        return code

    def set_back(self, member: Member, *, but: Call | None = None) -> None:
        """Have a member begin anew: all its calls ``but`` one are void, and so is what it holds."""
        reason = "the round goes on without this device"
        for call in [one for one in member.book.pending if one != but]:
            self.answer(member, Refusal(call=call, code="stale", reason=reason))
        member.stage = Stage.JOINED
        member.waiting = None
        member.fresh = True
        member.changing = False

    def lose(self, member: Member, reason: str) -> None:
        """Strike a member off."""
        self.registry.remove(member)
        self._gone(member, reason)

    def say_finished(self, reason: str, *, failed: bool) -> None:
        """Tell every member that the run is over."""
        for member in self.registry:
            topic = device_topic(member.device_id, "commands")
            self._link.send(topic, Finished(reason=reason, failed=failed))

    def _gone(self, member: Member, reason: str) -> None:
        level = logging.INFO if member.stage is Stage.DONE else logging.WARNING
        logger.log(level, "%s is gone: %s", member.device_id, reason)
        self._link.forget(member.device_id)
        self.listener.gone(member, reason)
        self._on_lost(member)

    def _topic(self, device: DeviceId, answer: Answer) -> Topic:
        if isinstance(answer, (Hidden, ActivationGradients, EvaluatedLoss)):
            return run_topic(self._run_id, device, "gradients")
        if isinstance(answer, RoundStart):
            return run_topic(self._run_id, device, "handback")
        if isinstance(answer, PieceBytes):
            return run_topic(self._run_id, device, "weights")
        return device_topic(device, "commands")

    # --- joining and living -------------------------------------------------------------------

    def _join(self, device: DeviceId, request: JoinRequest) -> None:
        result = self.registry.join(device, request, self._clock.monotonic_s())
        if isinstance(result, Held):
            logger.info("%s asks to join, but that id is in use; waiting for a sign of it", device)
        elif isinstance(result, Known):
            self._join_again(result.member, request)
        else:
            self._admitted(result, request)

    def _join_again(self, member: Member, request: JoinRequest) -> None:
        now = self._clock.monotonic_s()
        if self.registry.find(member.device_id, request.call.session) is None:
            return  # of an earlier life
        member.heard_s = now
        again, _ = member.book.repeat((request.call.number,), now, after_s=REPEAT_AFTER_S)
        for topic, answer in again:
            self._link.send(topic, answer)

    def _admitted(self, admitted: Admitted, request: JoinRequest) -> None:
        if admitted.replaced is not None:
            self._gone(admitted.replaced, "it joined again")
        self._welcome(admitted.member, request)

    def _welcome(self, member: Member, request: JoinRequest) -> None:
        self._link.admit(member.device_id)
        member.book.admit(request.call)
        self.listener.joined(member)
        profile = request.profile
        logger.info(
            "%s joined with %d sequences: %.80s, %.80s, %.80s, hsplit %s",
            member.device_id,
            profile.sequences,
            profile.machine,
            profile.accelerator or "no accelerator",
            profile.computes_with or profile.backend,
            profile.hsplit_version,
        )
        self.answer(
            member,
            Welcome(
                call=request.call,
                run_id=self._run_id,
                model=self._model,
                training=self._training,
                lora=self._lora,
                optimizer=self._optimizer,
                measure_at=self._measure_at(member.device_id),
            ),
        )

    def _heartbeat(self, device: DeviceId, beat: Heartbeat) -> None:
        now = self._clock.monotonic_s()
        refused = self.registry.heard(device, beat.session, now)
        if refused is not None:
            self._refuse_challenger(device, refused)
        member = self.registry.find(device, beat.session)
        if member is not None:
            member.telemetry = beat.telemetry or member.telemetry
            self._repeat(member, beat, now)
        elif not self.registry.is_held(device, beat.session):
            self._link.send(device_topic(device, "commands"), Rejoin(session=beat.session))

    def _refuse_challenger(self, device: DeviceId, request: JoinRequest) -> None:
        logger.warning("a second agent calls itself %s and is refused", device)
        reason = f"another agent is connected as {device!r}: give this one an id of its own"
        self.listener.turned_away(device, request.call.session, reason)
        refusal = Refusal(call=request.call, code="device_id_in_use", reason=reason)
        self._link.send(device_topic(device, "commands"), refusal)

    def _repeat(self, member: Member, beat: Heartbeat, now: float) -> None:
        device = member.device_id
        if not beat.awaiting or self._link.sending_to(device):
            return
        again, missing = member.book.repeat(beat.awaiting, now, after_s=REPEAT_AFTER_S)
        for topic, answer in again:
            logger.info("%s: repeating a lost answer (%s)", device, answer.type)
            self._link.send(topic, answer)
        # What is still trickling in over a slow link is not lost.
        if missing and not self._link.receiving_from(device, within_s=REPEAT_AFTER_S):
            resend = Resend(session=member.session, numbers=tuple(missing))
            self._link.send(device_topic(device, "commands"), resend)
