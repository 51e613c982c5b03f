"""One round as a state machine: events in, instructions out. No socket, no clock, no model.

A round is: every participant evaluates; then steps, each closed when every participant that
exchanges has handed in all its micro-batches; then results. A lost participant is waited for
no more; what it did in closed steps stays. One that is waited for longer than its `Allowance` is
left out: as if it were lost, but the round says so itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from shared.errors import ProtocolError
from shared.protocol.messages import DeviceId

# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A participant handed in the loss of its held-out part."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class MicroBatchDone:
    """The server took all that one micro-batch of ``device`` brings to step ``step``."""

    device: DeviceId
    step: int
    index: int
    of: int
    target_tokens: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """A participant handed in its adapters; ``target_tokens`` by its own count."""

    device: DeviceId
    target_tokens: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A participant is gone, or too late."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class Tick:
    """So many seconds went by, in which the round could have heard of everybody.

    ``served``: whose requests the server had yet to carry out; that is not their time. ``active``:
    who asked for something, or sent or got bytes.
    """

    seconds: float
    served: frozenset[DeviceId] = frozenset()
    active: frozenset[DeviceId] = frozenset()


Event: TypeAlias = Evaluated | MicroBatchDone | Delivered | Lost | Tick

# --- instructions ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CloseEvaluation:
    """All losses are in, from these devices."""

    devices: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class CloseStep:
    """Take the optimizer step over what these devices accumulated, ``target_tokens`` in all."""

    step: int
    devices: tuple[DeviceId, ...]
    target_tokens: int


@dataclass(frozen=True, slots=True)
class CloseRound:
    """Nobody is waited for any more; these devices delivered their adapters."""

    delivered: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """Forget what this device did of the open step: the round no longer waits for it."""

    device: DeviceId
    waited_s: float


Instruction: TypeAlias = CloseEvaluation | CloseStep | CloseRound | LeaveOut

# --- patience -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How many seconds a round waits for one device; the server's own work is not among them.

    ``quiet_s``: with no request of it and nothing moving on its link (one that trains alone is
    quiet by nature, and evaluates alone, too). ``evaluate_s``, ``first_step_s``, ``step_s``: in
    all, until it evaluated, until its part of the round's first and of each later step is in, and
    then until its adapters are; ``hand_in_s``: for these, beside ``step_s``. ``alone_s``: all
    steps and the adapters of one that trains alone.
    """

    quiet_s: float = 300.0
    evaluate_s: float = 3000.0
    first_step_s: float = 3000.0
    step_s: float = 3000.0
    hand_in_s: float = 0.0
    alone_s: float = 3000.0


class Round:
    """The state of one round; `handle` is the only way to change it.

    ``exchanging``: participants whose activations go through the server. ``alone``: those that
    hold all blocks and the head. ``steps`` 0: the round only evaluates. ``allowances``: how long
    it waits for each; the default for those who are not named.
    """

    def __init__(
        self,
        number: int,
        *,
        first_step: int,
        steps: int,
        exchanging: Iterable[DeviceId],
        alone: Iterable[DeviceId] = (),
        allowances: Mapping[DeviceId, Allowance] | None = None,
    ) -> None:
        """Open the round at its first step."""
        self.number = number
        self.first_step = first_step
        self.step = first_step
        self.end_step = first_step + steps
        self.closed = False
        self._only_evaluates = steps == 0
        self._exchanging = set(exchanging)
        self._alone = set(alone)
        self._to_evaluate = set(self.participants)
        self._evaluated: list[DeviceId] = []
        self._evaluation_closed = False
        self._delivered: list[DeviceId] = []
        self._done: dict[DeviceId, dict[int, int]] = {}
        self._announced: dict[DeviceId, int] = {}
        self._complete: set[DeviceId] = set()
        self._tokens: Counter[DeviceId] = Counter()
        self._allowances = allowances or {}
        self._waited_s: dict[DeviceId, float] = {}
        self._quiet_s: dict[DeviceId, float] = {}

    @property
    def participants(self) -> frozenset[DeviceId]:
        """Who still takes part."""
        return frozenset(self._exchanging | self._alone)

    @property
    def exchanging(self) -> frozenset[DeviceId]:
        """Whose activations go through the server, of those who still take part."""
        return frozenset(self._exchanging)

    @property
    def target_tokens(self) -> Mapping[DeviceId, int]:
        """Tokens per device over the closed steps, also of devices lost since."""
        return self._tokens

    @property
    def delivered(self) -> frozenset[DeviceId]:
        """Who handed in its adapters: what happens to it now no longer touches the round."""
        return frozenset(self._delivered)

    @property
    def training(self) -> bool:
        """Whether the step `step` is open."""
        return not self.closed and self.step < self.end_step

    @property
    def waiting_for(self) -> frozenset[DeviceId]:
        """Whose doing would bring the round on."""
        if self.closed:
            return frozenset()
        if self._to_evaluate:
            return frozenset(self._to_evaluate)
        if self.training and self._exchanging:
            return frozenset(self._exchanging - self._complete)
        return self.participants - set(self._delivered)

    def handle(self, event: Event) -> tuple[Instruction, ...]:
        """Take one event; return what must now be done, in order.

        Raises:
            ProtocolError: the event is of a device, step or micro-batch that is not due.
        """
        if self.closed:
            return ()
        if isinstance(event, Tick):
            return (*self._pass_time(event), *self._advance())
        if isinstance(event, Lost):
            self._lose(event.device)
        elif event.device not in self.participants:
            raise ProtocolError(f"{event.device} is not part of round {self.number}")
        elif isinstance(event, Evaluated):
            self._evaluate(event.device)
        elif isinstance(event, MicroBatchDone):
            self._finish_micro_batch(event)
        else:
            self._deliver(event)
        return tuple(self._advance())

    def _lose(self, device: DeviceId) -> None:
        if device in self._delivered:
            return  # it has done all that this round asked of it
        for group in (self._exchanging, self._alone, self._to_evaluate, self._complete):
            group.discard(device)
        self._done.pop(device, None)
        self._announced.pop(device, None)

    def _pass_time(self, tick: Tick) -> list[LeaveOut]:
        waiting_for = self.waiting_for
        for device in waiting_for | (frozenset() if self._to_evaluate else self._alone):
            if device in tick.served:
                self._quiet_s[device] = 0.0
                continue
            self._waited_s[device] = self._waited_s.get(device, 0.0) + tick.seconds
            quiet_s = 0.0 if device in tick.active else self._quiet_s.get(device, 0.0)
            self._quiet_s[device] = quiet_s + tick.seconds
        late = [device for device in sorted(waiting_for) if self._is_late(device)]
        for device in late:
            self._lose(device)
        return [LeaveOut(device, self._waited_s[device]) for device in late]

    def _is_late(self, device: DeviceId) -> bool:
        allowed = self._allowances.get(device, Allowance())
        most_s = self._allowed_s(device, allowed)
        is_silent = self._quiet_s.get(device, 0.0) > allowed.quiet_s
        return self._waited_s.get(device, 0.0) > most_s or (is_silent and device not in self._alone)

    def _allowed_s(self, device: DeviceId, allowed: Allowance) -> float:
        if self._to_evaluate:
            return allowed.evaluate_s
        if device in self._alone:
            return allowed.alone_s
        if self.step == self.end_step:
            return allowed.step_s + allowed.hand_in_s
        return allowed.first_step_s if self.step == self.first_step else allowed.step_s

    def _wait_anew(self, devices: Iterable[DeviceId]) -> None:
        for device in devices:
            self._waited_s.pop(device, None)
            self._quiet_s.pop(device, None)

    def _evaluate(self, device: DeviceId) -> None:
        if device in self._to_evaluate:
            self._to_evaluate.discard(device)
            self._evaluated.append(device)

    def _finish_micro_batch(self, event: MicroBatchDone) -> None:
        if event.device not in self._exchanging or event.step != self.step or not self.training:
            raise ProtocolError(
                f"{event.device}: step {event.step} of round {self.number} is not open"
            )
        if event.index >= event.of:
            raise ProtocolError(f"{event.device}: micro-batch {event.index} of {event.of}")
        done = self._done.setdefault(event.device, {})
        if event.index in done:
            raise ProtocolError(f"{event.device}: micro-batch {event.index} came twice")
        if self._announced.setdefault(event.device, event.of) != event.of:
            raise ProtocolError(
                f"{event.device}: {event.of} micro-batches, {self._announced[event.device]} before"
            )
        done[event.index] = event.target_tokens
        if len(done) == event.of:
            self._complete.add(event.device)

    def _deliver(self, event: Delivered) -> None:
        if event.device in self._delivered:
            return
        if event.device in self._to_evaluate:
            raise ProtocolError(f"{event.device} delivered before it evaluated")
        # The others may still be at the last step when this device has done its part of it.
        last = self.step == self.end_step - 1 and event.device in self._complete
        if event.device in self._exchanging and self.training and not last:
            raise ProtocolError(f"{event.device} delivered while step {self.step} waits for it")
        self._delivered.append(event.device)
        if event.device in self._alone:
            self._tokens[event.device] = event.target_tokens

    def _advance(self) -> Iterable[Instruction]:
        if not self._to_evaluate and not self._evaluation_closed:
            self._evaluation_closed = True
            self._wait_anew(self.participants)
            yield CloseEvaluation(tuple(sorted(self._evaluated)))
        if self.training and self._exchanging and self._complete >= self._exchanging:
            yield self._close_step()
        if self._is_over():
            self.closed = True
            yield CloseRound(tuple(sorted(self._delivered)))

    def _close_step(self) -> CloseStep:
        tokens = {device: sum(done.values()) for device, done in self._done.items()}
        self._tokens.update(tokens)
        close = CloseStep(self.step, tuple(sorted(tokens)), sum(tokens.values()))
        self.step += 1
        self._done.clear()
        self._announced.clear()
        self._complete.clear()
        self._wait_anew(self._exchanging - self._to_evaluate)
        return close

    def _is_over(self) -> bool:
        if self._to_evaluate:
            return False
        if self._only_evaluates:
            return True
        if self.training and self._exchanging:
            return False
        return self.participants <= set(self._delivered)
