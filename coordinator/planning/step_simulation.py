"""How long a step of a whole fleet takes: its rules played through, event by event. Pure.

The rules are those of `edge_agent.local_training` and `coordinator.exchange`: a device computes
one thing at a time, answers before new micro-batches, and keeps at most ``in_flight`` of them on
their way; each way of its link carries one message at a time; the server computes one thing at a
time, what closes a micro-batch first, then in the order of arrival; a step begins on the server
when the one before it is closed, and a device may be one step ahead.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

STEPS = 4
"""Steps that are played after the first, which starts cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request of a micro-batch and its answer: seconds on the way up, at the server, down."""

    up: float
    server: float
    down: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevice:
    """A device's step: ``micro_batches`` times ``compute`` and ``exchanges`` in turns.

    ``compute`` has one entry more than ``exchanges``. ``latency_s``: of a message one way, during
    which the link is free for others. A device without exchanges does not wait for anybody.
    """

    micro_batches: int
    in_flight: int
    compute: tuple[float, ...]
    exchanges: tuple[Exchange, ...]
    latency_s: float
    optimizer_s: float

    @property
    def alone_s(self) -> float:
        """Seconds of a step in which nothing is exchanged."""
        return self.micro_batches * sum(self.compute) + self.optimizer_s


def step_seconds(
    devices: Sequence[SimulatedDevice], *, server_optimizer_s: float, open_micro_batches: int
) -> float:
    """Return the seconds of one step of this fleet once it has found its pace."""
    alone = max((one.alone_s for one in devices if not one.exchanges), default=0.0)
    exchanging = [one for one in devices if one.exchanges]
    if not exchanging:
        return alone
    return max(alone, _Fleet(exchanging, server_optimizer_s, open_micro_batches).pace_s())


@dataclass(slots=True)
class _Resource:
    """What does one thing at a time, in the order of arrival."""

    free_s: float = 0.0

    def take(self, now_s: float, seconds: float) -> float:
        self.free_s = max(self.free_s, now_s) + seconds
        return self.free_s


@dataclass(slots=True)
class _Device:
    spec: SimulatedDevice
    step: int = 0
    sent: int = 0
    open: int = 0
    finished: int = 0
    is_busy: bool = False
    began_s: list[float] = field(default_factory=list)
    answers: deque[int] = field(default_factory=deque)
    uplink: _Resource = field(default_factory=_Resource)
    downlink: _Resource = field(default_factory=_Resource)


@dataclass(frozen=True, slots=True)
class _Job:
    device: _Device
    step: int
    stage: int


class _Fleet:
    """The state of the play. Time moves from event to event."""

    def __init__(
        self, specs: Sequence[SimulatedDevice], server_optimizer_s: float, open_micro_batches: int
    ) -> None:
        self._devices = [_Device(spec) for spec in specs]
        self._server_optimizer_s = server_optimizer_s
        self._most_open = open_micro_batches
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now_s = 0.0
        self._first: deque[_Job] = deque()
        self._later: deque[_Job] = deque()
        self._server_is_busy = False
        self._open_at_server = 0
        self._step = 0
        self._missing = sum(one.spec.micro_batches for one in self._devices)
        self._closed_s: list[float] = []

    def pace_s(self) -> float:
        """Return the seconds from step to step: of the server or a device, whoever is slowest.

        Who is slower than the server may lag behind it for many steps before anybody waits.
        """
        for device in self._devices:
            self._begin(device)
        slowest = min(self._devices, key=lambda device: len(device.began_s))
        while self._events and len(slowest.began_s) < STEPS + 2:
            self._now_s, _, act = heapq.heappop(self._events)
            act()
            slowest = min(self._devices, key=lambda device: len(device.began_s))
        times = [self._closed_s, *(device.began_s for device in self._devices)]
        return max((own[STEPS] - own[1]) / (STEPS - 1) for own in times)

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), act))

    # --- a device -----------------------------------------------------------------------------

    def _work(self, device: _Device) -> None:
        """Let a device that is idle begin what it does next."""
        spec = device.spec
        if device.is_busy:
            return
        if device.answers:
            stage = device.answers.popleft()
        elif device.sent < spec.micro_batches and device.open < spec.in_flight:
            stage = 0
            device.sent += 1
            device.open += 1
        else:
            return
        device.is_busy = True
        self._at(self._now_s + spec.compute[stage], lambda: self._computed(device, stage))

    def _computed(self, device: _Device, stage: int) -> None:
        device.is_busy = False
        if stage < len(device.spec.exchanges):
            job = _Job(device, device.step, stage)
            over_s = device.uplink.take(self._now_s, device.spec.exchanges[stage].up)
            self._at(over_s + device.spec.latency_s, lambda: self._arrive(job))
        else:
            device.open -= 1
            device.finished += 1
        if device.finished == device.spec.micro_batches:
            device.finished = device.sent = 0
            device.step += 1
            device.is_busy = True
            self._at(self._now_s + device.spec.optimizer_s, lambda: self._begin(device))
            return
        self._work(device)

    def _begin(self, device: _Device) -> None:
        device.is_busy = False
        device.began_s.append(self._now_s)
        self._work(device)

    def _answered(self, device: _Device, stage: int) -> None:
        device.answers.append(stage)
        self._work(device)

    # --- the server ---------------------------------------------------------------------------

    def _arrive(self, job: _Job) -> None:
        (self._later if job.stage == 0 else self._first).append(job)
        self._serve()

    def _serve(self) -> None:
        if self._server_is_busy:
            return
        job = self._next_job()
        if job is None:
            return
        self._server_is_busy = True
        seconds = job.device.spec.exchanges[job.stage].server
        self._at(self._now_s + seconds, lambda: self._served(job))

    def _next_job(self) -> _Job | None:
        if self._first:
            return self._first.popleft()
        if self._open_at_server >= self._most_open:
            return None
        job = next((one for one in self._later if one.step == self._step), None)
        if job is not None:
            self._later.remove(job)
            self._open_at_server += 1
        return job

    def _served(self, job: _Job) -> None:
        device, spec = job.device, job.device.spec
        over_s = device.downlink.take(self._now_s, spec.exchanges[job.stage].down)
        self._at(over_s + spec.latency_s, lambda: self._answered(device, job.stage + 1))
        if job.stage + 1 == len(spec.exchanges):
            self._open_at_server -= 1
            self._missing -= 1
        if self._missing == 0:
            self._close()
        else:
            self._release()

    def _close(self) -> None:
        self._missing = sum(one.spec.micro_batches for one in self._devices)
        self._step += 1
        self._closed_s.append(self._now_s + self._server_optimizer_s)
        self._at(self._closed_s[-1], self._release)

    def _release(self) -> None:
        self._server_is_busy = False
        self._serve()
