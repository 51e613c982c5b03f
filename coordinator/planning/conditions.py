"""What a plan follows from: each device as the planner knows it, and the run around them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.planning.device_plan import DevicePlan
from coordinator.settings import CoordinatorSettings, DeviceTerms, RankPolicy
from shared.architecture import ModelArchitecture
from shared.protocol.messages import DeviceId
from shared.protocol.profile import DataShape, LinkMeasurement, Measurements
from shared.terms import HandBackMode, LoraTerms, TrainingTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDevice:
    """One device to plan for.

    ``most_blocks``: it could not prepare more. ``slowdown``: seconds that it was seen to compute
    over those that its measurements predict. ``pinned``: it keeps this part, and counts as load.
    """

    device_id: DeviceId
    terms: DeviceTerms
    measurements: Measurements | None = None
    data: DataShape | None = None
    declared_limit_bytes: int | None = None
    most_blocks: int | None = None
    slowdown: float = 1.0
    pinned: DevicePlan | None = None

    @property
    def memory_limit_bytes(self) -> int | None:
        """The smallest of what was measured, declared and set; None: no limit is known."""
        measured = None if self.measurements is None else self.measurements.memory_bytes
        limits = (measured, self.declared_limit_bytes, self.terms.memory_limit_bytes)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def link(self) -> LinkMeasurement | None:
        """Its way through the broker; None: not measured, so taken as free."""
        return None if self.measurements is None else self.measurements.link


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The run that a fleet is planned for.

    ``server``: None: not measured, so its work is taken as free. ``server_lora``: what the
    server's copies of the blocks are adapted with. ``rounds``: aggregations of the whole run,
    which bound what a `residual` can grow to. ``most_blocks`` that any device may be given;
    ``one_split_layer``: all that are planned get the same. ``only_split_layer``: and it is this.
    """

    architecture: ModelArchitecture
    training: TrainingTerms
    server: Measurements | None = None
    server_slowdown: float = 1.0
    server_lora: LoraTerms = field(default_factory=LoraTerms)
    hand_back: HandBackMode = "residual"
    rounds: int = 5
    open_micro_batches: int = 16
    balance_batches: bool = True
    most_blocks: int | None = None
    one_split_layer: bool = False
    only_split_layer: int | None = None
    ranks: RankPolicy = "importance"

    @classmethod
    def of(
        cls,
        settings: CoordinatorSettings,
        architecture: ModelArchitecture,
        *,
        server: Measurements | None,
        server_slowdown: float = 1.0,
    ) -> Conditions:
        """Return the conditions that a run's settings mean."""
        return cls(
            architecture=architecture,
            training=settings.training_terms,
            server=server,
            server_slowdown=server_slowdown,
            server_lora=settings.lora,
            hand_back=settings.aggregation.hand_back,
            rounds=settings.rounds.count,
            open_micro_batches=settings.devices.open_micro_batches,
            balance_batches=settings.plan.balance_batches,
            most_blocks=settings.plan.most_blocks or max(1, architecture.block_count - 1),
            one_split_layer=settings.plan.one_split_layer,
            ranks=settings.plan.ranks,
        )
