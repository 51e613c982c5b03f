"""A device's life, from joining to goodbye, as one script; and the loop that drives it."""

from __future__ import annotations

import logging

from edge_agent.conversation import (
    Conversation,
    RejoinNeededError,
    RunOverError,
    Script,
    StaleError,
    Waiting,
)
from edge_agent.participation import Participation, Parts
from shared.errors import HsplitError
from shared.protocol.messages import DeviceProfile, Finished, JoinRequest, Welcome

logger = logging.getLogger(__name__)


class Agent:
    """Drives one device's script over a conversation. Belongs to one thread."""

    def __init__(self, conversation: Conversation, profile: DeviceProfile, parts: Parts) -> None:
        """Take the parts; nothing is sent before the first `turn`."""
        self._conversation = conversation
        self._profile = profile
        self._parts = parts
        self._script = self._life()
        self._waiting: Waiting | None = None
        self._participation: Participation | None = None
        self.outcome: Finished | None = None

    @property
    def finished(self) -> bool:
        """Whether the run is over for this device."""
        return self.outcome is not None

    @property
    def phase(self) -> str:
        """What the device is doing, in a few words."""
        return "joining" if self._participation is None else self._participation.phase

    @property
    def next_due_s(self) -> float:
        """When `turn` has something to do though nothing arrives."""
        return self._conversation.next_due_s

    def turn(self, timeout_s: float) -> bool:
        """Take one event, waiting for it up to ``timeout_s``, and go on as far as it leads.

        Returns whether anything happened.

        Raises:
            HsplitError: the device cannot go on; the message says why.
        """
        try:
            if self._waiting is None:
                self._waiting = next(self._script)
                return True
            came = self._conversation.pump(timeout_s)
            try:
                answered = self._conversation.take(self._waiting)
            except HsplitError as error:
                self._waiting = self._script.throw(error)
                return True
            if answered is None:
                return came
            self._waiting = self._script.send(answered)
        except StopIteration:
            self._waiting = frozenset()
        return True

    def _life(self) -> Script[None]:
        while self.outcome is None:
            try:
                self.outcome = yield from self._take_part()
            except RunOverError as over:
                self.outcome = over.finished
            except RejoinNeededError as reason:
                logger.warning("joining again: %s", reason)
                self._parts.backend.discard()
                self._conversation.renew()

    def _take_part(self) -> Script[Finished]:
        self._participation = None
        logger.info("asking the coordinator to join")
        welcome = yield from self._conversation.ask(
            lambda call: JoinRequest(call=call, profile=self._profile), Welcome
        )
        self._conversation.enter(welcome.run_id)
        logger.info("joined run %s (base model %s)", welcome.run_id, welcome.model.name)
        self._participation = Participation(self._conversation, welcome, self._parts)
        yield from self._participation.get_ready()
        while True:
            try:
                return (yield from self._participation.run())
            except StaleError as reason:
                logger.warning("out of this round, waiting for the next: %s", reason)
                self._parts.backend.discard()
                self._conversation.forget_calls()
