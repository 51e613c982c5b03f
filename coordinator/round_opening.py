"""A round's beginning: what everybody starts from, the driver of the round, and telling devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator import answers
from coordinator.aggregation import SERVER
from coordinator.deadlines import allowances
from coordinator.exchange import ExchangeLimits
from coordinator.fleet import Fleet
from coordinator.global_model import GlobalModel
from coordinator.handback import HandBack
from coordinator.membership import Membership
from coordinator.registry import Member, Stage
from coordinator.reporting import Reporter
from coordinator.round_driver import RoundDriver
from coordinator.rounds import Round
from coordinator.run_listener import Start
from coordinator.settings import CoordinatorSettings
from shared.architecture import ModelArchitecture
from shared.clock import Clock
from shared.protocol.messages import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """A round of which its members know nothing yet; ``probe``: sequences to measure on."""

    driver: RoundDriver
    handed: HandBack
    probe: int


class RoundOpener:
    """Opens rounds. Belongs to the owner's thread."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        architecture: ModelArchitecture,
        *,
        model: GlobalModel,
        fleet: Fleet,
        members: Membership,
        reporter: Reporter,
        clock: Clock,
    ) -> None:
        """Take what rounds are made of."""
        self._settings = settings
        self._architecture = architecture
        self._model = model
        self._fleet = fleet
        self._members = members
        self._reporter = reporter
        self._clock = clock

    def open(self, number: int, members: Sequence[Member]) -> Opened:
        """Prepare round ``number`` of ``members``; past the last round they only evaluate."""
        rounds = self._settings.rounds
        steps = rounds.steps if number <= rounds.count else 0
        probe = self._fleet.probe_sequences(number) if steps else 0
        handed = self._model.start_round(number, members, server_ranks=self._fleet.server_ranks)
        alone = self._alone(members)
        driver = RoundDriver(
            Round(
                number,
                first_step=(number - 1) * rounds.steps,
                steps=steps,
                exchanging={member.device_id for member in members} - alone,
                alone=alone,
                allowances=allowances(
                    members,
                    handed=handed,
                    step_s=self._fleet.step_seconds(),
                    steps=steps,
                    probe_sequences=probe,
                    rules=self._settings.devices,
                ),
            ),
            handed=handed,
            alone=alone,
            model=self._model,
            members=self._members,
            reporter=self._reporter,
            optimizer=self._settings.optimizer,
            total_steps=self._settings.total_steps,
            limits=ExchangeLimits.of(self._settings, probe_sequences=probe),
            candidates=self._model.update.keys(),
            clock=self._clock,
        )
        return Opened(driver=driver, handed=handed, probe=probe)

    def start(self, opened: Opened, members: Sequence[Member]) -> None:
        """Hand every member what it starts from."""
        round_, handed = opened.driver.round, opened.handed
        plans = {member.device_id: member.plan for member in members if member.plan is not None}
        self._reporter.round_started(round_.number, of=self._settings.rounds.count, plans=plans)
        self._reporter.planned(
            round_.number,
            round_.first_step,
            plans=plans,
            server_ranks=handed.ranks_of(SERVER),
            fleet=self._fleet.latest,
        )
        first = round_.first_step
        start = Start(
            members=members,
            alone=opened.driver.alone,
            positions={one.device_id: self._fleet.position(one, first) for one in members},
            server_ranks=handed.ranks_of(SERVER),
        )
        self._members.listener.round_opened(round_, start)
        for member in members:
            self._hand_back(member, opened, first_sequence=start.positions[member.device_id])

    def _alone(self, members: Sequence[Member]) -> frozenset[DeviceId]:
        """Return who needs no server: those that hold all blocks, and the head."""
        whole = self._architecture.block_count
        head = self._settings.training.labels == "device"
        plans = ((member.device_id, member.plan) for member in members)
        return frozenset(d for d, plan in plans if head and plan and plan.split_layer == whole)

    def _hand_back(self, member: Member, opened: Opened, *, first_sequence: int) -> None:
        assert member.waiting is not None  # it is prepared
        round_ = opened.driver.round
        steps = round_.end_step - round_.first_step
        start = answers.round_start(
            member.waiting,
            opened.handed,
            member.device_id,
            classifier=self._model.classifier_for(member.device_id),
            first_step=round_.first_step,
            steps=steps,
            first_sequence=first_sequence,
            probe_sequences=opened.probe,
        )
        member.waiting = None
        member.stage = Stage.IN_ROUND if steps else Stage.DONE
        member.fresh = False
        self._members.await_request(member)
        self._members.answer(member, start)
