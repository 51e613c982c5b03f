"""What a coordinator can be told: `CoordinatorSettings`, the contents of ``run.yaml``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, field_validator, model_validator

from shared.config import (
    BrokerSettings,
    ComputeDevice,
    HsplitSettings,
    MemoryLimit,
    PositiveInt,
    Section,
    UserPath,
)
from shared.errors import ConfigError
from shared.protocol.messages import Device, DeviceId, Run, RunId
from shared.terms import (
    Alpha,
    HandBackMode,
    LoraTerms,
    OptimizerTerms,
    Rank,
    TrainingChoices,
    TrainingTerms,
)

Timeout: TypeAlias = Annotated[float, Gt(0), Lt(1e7)]

RankPolicy: TypeAlias = Literal["importance", "uniform"]
"""Where a device's adapter parameters go: where the weights matter, or evenly as ``lora`` says."""

StrategyName: TypeAlias = Literal[
    "hsplitlora", "splitlora", "hlora", "fedlora", "hetlora", "flora", "ffa-lora"
]
"""A method of the field; see `coordinator.strategies`."""

_LONGEST_MODEL_NAME = 40


class RunSettings(Section):
    """Names the run, whose folder is ``folder/id``; without ``id`` date and model make one."""

    id: Run | None = None
    folder: UserPath = Path("runs")


class ModelSettings(Section):
    """The base model: a name on the Hugging Face hub, or a local folder."""

    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None


class EmbeddedBrokerSettings(Section):
    """The broker that the coordinator starts itself where ``broker`` is not given.

    ``prefer: auto`` takes mosquitto where it is installed, else amqtt. ``port`` 0: a free one.
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65_535)] = 1883
    prefer: Literal["auto", "mosquitto", "amqtt"] = "auto"


class DeviceRules(Section):
    """How many devices a run takes, and how long it waits for them.

    The first round starts once ``min`` devices are ready and either ``expected`` are (None: no
    more than ``min``) or ``wait_s`` passed since; who comes later joins the next round. Fewer
    than ``min`` for ``join_timeout_s`` end the run. A device not heard for ``lost_after_s`` is
    lost. A round goes on without one that it waits for and that asks nothing for
    ``step_timeout_s``, or whose step takes ``late_factor`` times as long as planned and longer than
    ``late_after_s``.
    The server keeps the activations of at most ``open_micro_batches`` at once.
    """

    min: PositiveInt = 1
    expected: PositiveInt | None = None
    wait_s: Annotated[float, Ge(0), Lt(1e7)] = 60.0
    join_timeout_s: Timeout = 600.0
    lost_after_s: Timeout = 6.0
    step_timeout_s: Timeout = 300.0
    late_factor: Annotated[float, Ge(1), Le(1000)] = 5.0
    late_after_s: Timeout = 30.0
    open_micro_batches: PositiveInt = 16

    @model_validator(mode="after")
    def _check_counts(self) -> DeviceRules:
        if self.expected is not None and self.expected < self.min:
            raise ValueError(f"expected ({self.expected}) is below min ({self.min})")
        return self


class DeviceOverrides(Section):
    """What the plan says of one device; what is not said here is as for all."""

    split_layer: PositiveInt | None = None
    r: Rank | None = None
    lora_alpha: Alpha | None = None
    rank_pattern: Mapping[str, Rank] | None = None
    alpha_pattern: Mapping[str, Alpha] | None = None
    batch: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    in_flight: PositiveInt | None = None
    memory_limit: MemoryLimit | None = None


class PlanSettings(Section):
    """Who computes how much. Without ``split_layer`` it follows from what devices measured.

    ``batch``: sequences of a device per step. ``in_flight``: micro-batches that one device may
    have on their way; ``micro_batch``: sequences in each, None for as many as make ``in_flight``,
    or as the planner finds best. ``balance_batches``: of devices that measured themselves, the
    fast ones may take more sequences and the slow ones fewer, on average ``batch``; a device whose
    own ``batch`` is set keeps it. ``most_blocks``: that a planned device may get, None for all but
    one: nobody then holds the whole model who was not told to. ``one_split_layer``: all planned
    devices get the same, the one with the shortest step of those that most can carry. ``ranks``:
    where a planned device's adapter parameters go; how important weights are is measured on
    ``probe_sequences`` of each device, in every ``probe_every``-th round from the first on.
    ``adapt``: parts may change between rounds.
    """

    split_layer: PositiveInt | None = None
    batch: PositiveInt = 8
    micro_batch: PositiveInt | None = None
    in_flight: PositiveInt = 2
    balance_batches: bool = True
    most_blocks: PositiveInt | None = None
    one_split_layer: bool = False
    ranks: RankPolicy = "importance"
    probe_sequences: Annotated[int, Ge(0), Le(4096)] = 16
    probe_every: PositiveInt = 2
    adapt: bool = True
    devices: Mapping[Device, DeviceOverrides] = Field(default_factory=dict)


class RoundSettings(Section):
    """How long the run is: ``count`` rounds of ``steps`` optimizer steps."""

    count: PositiveInt = 5
    steps: PositiveInt = 20


class AggregationSettings(Section):
    """How adapters come together, and what devices get back.

    ``outlier_factor``: how far beyond the others' an update may be before it is refused
    (`coordinator.outliers`); null: however far.
    """

    hand_back: HandBackMode = "residual"
    tolerance: Annotated[float, Ge(0), Lt(1)] = 1e-6
    outlier_factor: Annotated[float, Gt(0), Lt(1e6)] | None = 10.0


class CheckpointSettings(Section):
    """How many of the latest checkpoints stay on disk."""

    keep: PositiveInt = 3


class ExportSettings(Section):
    """What is written at the end beside the adapter: the ``merged`` model, where wanted."""

    merged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTerms:
    """The plan settings as they hold for one device. ``split_layer`` None: it is planned.

    ``batch_is_stated``, ``micro_batch_is_stated``: somebody chose the number, so it stays.
    """

    split_layer: int | None
    batch: int
    micro_batch: int
    in_flight: int
    memory_limit_bytes: int | None
    lora: LoraTerms
    batch_is_stated: bool = False
    micro_batch_is_stated: bool = False


class CoordinatorSettings(HsplitSettings):
    """Everything that the operator decides, in sections; one file describes one run."""

    run: RunSettings = RunSettings()
    strategy: StrategyName = "hsplitlora"
    model: ModelSettings
    broker: BrokerSettings | None = None
    embedded_broker: EmbeddedBrokerSettings = EmbeddedBrokerSettings()
    devices: DeviceRules = DeviceRules()
    plan: PlanSettings = PlanSettings()
    rounds: RoundSettings = RoundSettings()
    aggregation: AggregationSettings = AggregationSettings()
    lora: LoraTerms = LoraTerms()
    optimizer: OptimizerTerms = OptimizerTerms()
    training: TrainingChoices = TrainingChoices()
    checkpoints: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    threads: PositiveInt | None = None
    """CPU threads of the server's part; None: as many as torch takes."""
    device: ComputeDevice = "auto"
    """Where the server's part computes."""
    memory_limit: MemoryLimit | None = None
    """What the server's part may use; None: as much as it needs."""
    report_to: tuple[Literal["tensorboard"], ...] = ("tensorboard",)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.rounds.count * self.rounds.steps

    @property
    def training_terms(self) -> TrainingTerms:
        """The training terms that devices are told."""
        return TrainingTerms(**asdict(self.training), total_steps=self.total_steps)

    @property
    def compute_device(self) -> str | None:
        """Where the server computes, in torch's words; None: on a GPU where there is one."""
        return None if self.device == "auto" else self.device

    @property
    def run_id(self) -> RunId:
        """The run's id.

        Raises:
            ConfigError: none was given and `with_run_id` has not made one.
        """
        if self.run.id is None:
            raise ConfigError("run.id is not set")
        return self.run.id

    @property
    def run_folder(self) -> Path:
        """The folder that holds all of this run."""
        return self.run.folder / self.run_id

    def with_run_id(self, wall_s: float) -> CoordinatorSettings:
        """Return these settings with an id, made where none was given: ``20260131-235959-gpt2``.

        ``wall_s`` seconds since 1970; the date is UTC.
        """
        if self.run.id is not None:
            return self
        date = time.strftime("%Y%m%d-%H%M%S", time.gmtime(wall_s))
        model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.model.name).name)
        run_id = RunId(f"{date}-{model[:_LONGEST_MODEL_NAME]}")
        return self.model_copy(update={"run": self.run.model_copy(update={"id": run_id})})

    def device_terms(self, device_id: DeviceId) -> DeviceTerms:
        """Return the plan settings of one device: its own where given, else those for all."""
        return _terms(self.plan, self.lora, self.plan.devices.get(device_id, DeviceOverrides()))

    @field_validator("lora")
    @classmethod
    def _check_patterns(cls, lora: LoraTerms) -> LoraTerms:
        for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
            _check_pattern(pattern)
        return lora

    @field_validator("training")
    @classmethod
    def _check_classes(cls, training: TrainingChoices) -> TrainingChoices:
        classes = training.classes
        if training.task == "classification" and len(classes) < 2:
            raise ValueError("task: classification takes two classes at least: name them, classes")
        if training.task != "classification" and classes:
            raise ValueError("classes are for task: classification: add that, or remove them")
        if len({name.strip() for name in classes if name.strip()}) != len(classes):
            raise ValueError("classes must have names, each another one")
        if training.int8_blocks and training.dtype != "float32":
            raise ValueError(
                f"int8_blocks are for dtype: float32, not {training.dtype}, in which the weights "
                "would be rounded a second time: remove one of them"
            )
        return training

    @model_validator(mode="after")
    def _check_together(self) -> CoordinatorSettings:
        if self.optimizer.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) should be below "
                f"rounds.count x rounds.steps ({self.total_steps})"
            )
        if self.aggregation.hand_back == "merge" and self.training.dtype != "float32":
            raise ValueError(
                "aggregation.hand_back: merge rounds every update into the base, which loses most "
                f"of it in {self.training.dtype}: use residual, or training.dtype float32"
            )
        if self.aggregation.hand_back == "merge" and self.training.int8_blocks:
            raise ValueError(
                "aggregation.hand_back: merge changes the base, and weights in 8 bits cannot be "
                "changed by so little: use residual, or remove training.int8_blocks"
            )
        _check_batch("plan", self.plan.batch, self.plan.micro_batch)
        for name, own in self.plan.devices.items():
            batch = own.batch or self.plan.batch
            _check_batch(f"plan.devices.{name}", batch, own.micro_batch)
            for pattern in (*(own.rank_pattern or ()), *(own.alpha_pattern or ())):
                _check_pattern(pattern)
        return self


def _terms(plan: PlanSettings, lora: LoraTerms, own: DeviceOverrides) -> DeviceTerms:
    batch = own.batch or plan.batch
    in_flight = own.in_flight or plan.in_flight
    changed = {
        name: getattr(own, name)
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        if getattr(own, name) is not None
    }
    return DeviceTerms(
        split_layer=own.split_layer or plan.split_layer,
        batch=batch,
        # What is set for all may exceed the smaller batch of one device.
        micro_batch=min(own.micro_batch or plan.micro_batch or -(-batch // in_flight), batch),
        in_flight=in_flight,
        memory_limit_bytes=own.memory_limit,
        lora=replace(lora, **changed),
        batch_is_stated=own.batch is not None,
        micro_batch_is_stated=(own.micro_batch or plan.micro_batch) is not None,
    )


def _check_batch(where: str, batch: int, micro_batch: int | None) -> None:
    if micro_batch is not None and micro_batch > batch:
        raise ValueError(f"{where}.micro_batch ({micro_batch}) exceeds its batch ({batch})")


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
