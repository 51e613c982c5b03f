"""The state of the model between rounds: the global update, and the server's part of the model.

Between two rounds everything that matters is here, so a checkpoint of it is a checkpoint of the
run, and a round that nobody finished is undone by going back to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from coordinator import classifier
from coordinator.aggregation import (
    SERVER,
    Aggregated,
    Contribution,
    GlobalUpdate,
    aggregate,
    block_of,
    initial,
)
from coordinator.checkpoints import Checkpoint
from coordinator.classifier import GlobalClassifier
from coordinator.handback import HandBack, Holder, carry_on, hand_back
from coordinator.model_store import ModelStore
from coordinator.planning.device_plan import adaptable_shapes
from coordinator.registry import Member
from coordinator.run_folder import STATE_BASE
from coordinator.server_training import ServerTrainer
from coordinator.settings import CoordinatorSettings
from coordinator.update_size import adapters_size, classifier_size
from shared.adapters import AdapterState, FactoredDelta, HeldAdapters, ModuleAdapter
from shared.architecture import ModelArchitecture
from shared.classifier_weights import ClassifierTensors
from shared.errors import ConfigError

logger = logging.getLogger(__name__)

RanksOf: TypeAlias = Callable[[range], tuple[Mapping[str, int], Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class _Boundary:
    """The server's part between two rounds: as a round left it, or as the next one found it."""

    held: HeldAdapters
    optimizer: Mapping[str, Any]
    classifier: ClassifierTensors


class GlobalModel:
    """Base + global update, and the trainer of the back. Belongs to the owner's thread."""

    def __init__(
        self, settings: CoordinatorSettings, store: ModelStore, architecture: ModelArchitecture
    ) -> None:
        """Start with no update at all; the trainer is built for the first round."""
        self._settings = settings
        self._store = store
        self._architecture = architecture
        self._mode = settings.aggregation.hand_back
        self._deltas: Mapping[str, FactoredDelta] | None = None
        self._boundary = _Boundary({}, {}, {})
        self._server_is_fresh = True
        self._server_held: HeldAdapters = {}
        self._resumed: _Boundary | None = None
        self.update: GlobalUpdate = initial(adaptable_shapes(settings.lora, architecture))
        self.classifier = classifier.initial(architecture, seed=settings.training.seed)
        self.trainer: ServerTrainer | None = None
        self._devices: Sequence[Holder] = ()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            ConfigError: its classifier is of another task, or of other classes.
        """
        found = {name: weight.shape for name, weight in checkpoint.classifier.items()}
        if found != self._architecture.classifier_shapes():
            raise ConfigError(
                "the checkpoint is of a run with another training.task, or another number of "
                "training.classes: put these back, or choose another run.id"
            )
        self.update = checkpoint.update
        self.classifier = GlobalClassifier(weights=checkpoint.classifier)
        self._resumed = _Boundary(
            checkpoint.server, checkpoint.optimizer, self._servers_own(checkpoint.classifier)
        )

    def checkpoint(self, *, round_: int, step: int, state: Mapping[str, Any]) -> Checkpoint:
        """Return what `resume` needs to start round ``round_`` + 1 again."""
        return Checkpoint(
            round=round_,
            step=step,
            update=self.update,
            server=self._boundary.held,
            optimizer=self._boundary.optimizer,
            classifier=self.classifier.weights,
            state={**state, STATE_BASE: self._store.fingerprint},
        )

    def start_round(
        self, number: int, members: Sequence[Member], *, server_ranks: RanksOf
    ) -> HandBack:
        """Prepare the server's part for the members' split layers, and decide the hand-back.

        ``server_ranks``: the ranks and scalings of the server's copy of some blocks.
        """
        first_block = self._first_block(members)
        if first_block is not None:
            self._provide_trainer(first_block)
        self._devices = holders = [_device_holder(member) for member in members]
        if self.trainer is not None:
            blocks = range(self.trainer.first_block, self._architecture.block_count)
            holders = [*holders, self._server_holder(blocks, *server_ranks(blocks))]
        handed = hand_back(
            self.update,
            holders,
            mode=self._mode,
            seed=self._settings.training.seed,
            round_=number,
            deltas=self._deltas,
        )
        self.update = handed.update
        self._deltas = None  # handed out: a round that starts again must not fold them twice
        if self.trainer is not None:
            self._hand_to_server(self.trainer, handed)
        return handed

    @property
    def class_count(self) -> int:
        """Classes that the run tells apart; 0: it learns to write."""
        return self._architecture.class_count

    @property
    def classifier_of_devices(self) -> GlobalClassifier:
        """What each device has of the classifier at the start of a round; empty: nothing."""
        on_devices = self._settings.training.labels == "device"
        return self.classifier if on_devices else GlobalClassifier()

    def classifier_for(self, device: str) -> ClassifierTensors:
        """Return what a device of the round that was started must be sent of the classifier."""
        return classifier.handed_to(device, self.classifier_of_devices, self._devices)

    def size_of(
        self,
        adapters: AdapterState,
        weights: ClassifierTensors,
        *,
        holder: Holder,
        learning_rates: float,
    ) -> Mapping[str, float]:
        """Return how large what a device delivered is, before it is aggregated, by what it is of.

        ``learning_rates``: the sum over the round's steps.
        """
        size = adapters_size(
            adapters,
            holder=holder,
            update=self.update,
            mode=self._mode,
            learning_rates=learning_rates,
        )
        if not weights:
            return {"adapters": size}
        start = self.classifier_of_devices.weights
        own = classifier_size(weights, started_from=start, learning_rates=learning_rates)
        return {"adapters": size, "classifier": own}

    def finish_round(self, contributions: Sequence[Contribution]) -> Aggregated:
        """Aggregate what the round brought into the global update, and the devices' classifiers."""
        aggregated = aggregate(
            self.update,
            contributions,
            server={} if self.trainer is None else self.trainer.adapters(),
            mode=self._mode,
            tolerance=self._settings.aggregation.tolerance,
        )
        self.update, self._deltas = aggregated.update, aggregated.deltas
        self.classifier = classifier.averaged(self.classifier, contributions)
        if self.trainer is not None:
            self._boundary = self._snapshot(self.trainer)
            if self._boundary.classifier:
                self.classifier = GlobalClassifier(weights=self._boundary.classifier)
        return aggregated

    def void_round(self) -> None:
        """Undo what an unfinished round did to the server's part."""
        if self.trainer is not None:
            self._put_back(self.trainer, self._boundary)

    def _first_block(self, members: Sequence[Member]) -> int | None:
        """Return the first block that the server needs; None where it needs nothing."""
        blocks = self._architecture.block_count
        splits = [m.plan.split_layer for m in members if m.plan is not None]
        if self._settings.training.labels == "device":
            splits = [split for split in splits if split < blocks]
        if self.trainer is not None:
            splits.append(self.trainer.first_block)
        elif self._resumed is not None:  # what the server had it must be able to take back
            splits += [block_of(module) for module in self._resumed.held]
        return min(splits, default=None)

    def _provide_trainer(self, first_block: int) -> None:
        if self.trainer is not None and self.trainer.first_block == first_block:
            return
        before = self._resumed
        if self.trainer is not None:
            before = self._snapshot(self.trainer)
            self.trainer = None  # so that there is never room needed for two
        self.trainer = ServerTrainer(
            self._store.config,
            self._store.tensors(),
            first_block=first_block,
            training=self._settings.training_terms,
            lora=self._settings.lora,
            optimizer=self._settings.optimizer,
            device=self._settings.compute_device,
        )
        self.trainer.set_classifier(self._servers_own(self.classifier.weights))
        held = self._architecture.block_count - first_block
        logger.info("the server holds the last %d of %d blocks", held, held + first_block)
        # What `merge` folded into the base is gone with the old trainer: all of it comes anew.
        self._server_is_fresh = before is None or self._mode == "merge"
        if before is not None and not self._server_is_fresh:
            self._put_back(self.trainer, before)
        self._resumed = None

    def _hand_to_server(self, trainer: ServerTrainer, handed: HandBack) -> None:
        replaced = handed.adapters_of(SERVER)
        before = {} if self._server_is_fresh else self._server_held
        trained = trainer.adapters()
        trainer.set_adapters(replaced, fold=handed.fold)
        if handed.fold:
            replaced = {module: ModuleAdapter(one.trainable) for module, one in replaced.items()}
        self._server_held = carry_on(before, trained=trained, replaced=replaced)
        self._server_is_fresh = False
        self._boundary = self._as_it_is(trainer, self._server_held)

    def _snapshot(self, trainer: ServerTrainer) -> _Boundary:
        held = carry_on(self._server_held, trained=trainer.adapters(), replaced={})
        return self._as_it_is(trainer, held)

    @staticmethod
    def _as_it_is(trainer: ServerTrainer, held: HeldAdapters) -> _Boundary:
        return _Boundary(held, trainer.optimizer_state(), trainer.classifier())

    def _servers_own(self, weights: ClassifierTensors) -> ClassifierTensors:
        """Return the weights of a classifier as far as the server has one."""
        return weights if self._settings.training.labels == "server" else {}

    def _put_back(self, trainer: ServerTrainer, boundary: _Boundary) -> None:
        self._server_held = boundary.held
        trainer.set_adapters(boundary.held, fold=False)
        trainer.set_classifier(boundary.classifier)
        trainer.restore_optimizer(boundary.optimizer)

    def _server_holder(
        self, blocks: range, ranks: Mapping[str, int], scalings: Mapping[str, float]
    ) -> Holder:
        return Holder(
            name=SERVER,
            blocks=blocks,
            ranks=dict(ranks),
            scalings=dict(scalings),
            fresh=self._server_is_fresh,
        )


def _device_holder(member: Member) -> Holder:
    plan = member.plan
    assert plan is not None  # participants have one
    return Holder(
        name=member.device_id,
        blocks=range(plan.split_layer),
        ranks=dict(plan.ranks),
        scalings=dict(plan.scalings),
        fresh=member.fresh,
    )
