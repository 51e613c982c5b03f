"""From settings to a finished run: builds the parts, drives the loop, writes the results."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from coordinator import checkpoints, report_page, run_folder, strategies
from coordinator.checkpoints import Checkpoint
from coordinator.classifier import TrainedClassifier
from coordinator.coordinator import RUN_COMPLETE, Coordinator
from coordinator.embedded_broker import EmbeddedBroker
from coordinator.export import export_adapter, export_merged
from coordinator.fleet import Fleet
from coordinator.global_model import GlobalModel
from coordinator.graphs.library import GraphLibrary
from coordinator.journal import Journal
from coordinator.lateness import Lateness
from coordinator.metrics import SUMMARY_FILE, DeviceSummary, MetricsWriter, Summary
from coordinator.model_card import CardDevice, ModelCard
from coordinator.model_store import ModelStore
from coordinator.outliers import Screening
from coordinator.planning.device_plan import adaptable_shapes
from coordinator.presence import Presence
from coordinator.reporting import Reporter, Tallies
from coordinator.server_measuring import ServerWork, measure_server
from coordinator.settings import CoordinatorSettings
from coordinator.state.run_state import RunState
from shared import health, logs
from shared.architecture import ModelArchitecture
from shared.classifier_weights import ClassifierTensors
from shared.clock import Clock
from shared.config import BrokerSettings
from shared.errors import HsplitError, StorageError
from shared.protocol.profile import Measurements
from shared.protocol.topics import coordinator_filters
from shared.transport.link import MessageLink
from shared.transport.mqtt import MqttTransport

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
MERGED = "merged"
IDLE_WAIT_S = 0.5
GOODBYE_S = 10.0


def run(settings: CoordinatorSettings, clock: Clock, *, resume: bool) -> Summary:
    """Carry out a run and return its summary; its folder then holds the adapter.

    With ``resume`` it goes on from its last checkpoint, if it has one.

    Raises:
        HsplitError: it cannot start, or cannot go on; the last checkpoint remains.
    """
    if resume:
        settings = run_folder.with_last_run(settings)
    settings = settings.with_run_id(clock.wall_s())
    logs.bind(run_id=settings.run_id)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with run_folder.locked(settings.run_folder), contextlib.ExitStack() as stack:
        start = _prepared(settings, resume=resume)
        settings, checkpoint = start.settings, start.checkpoint
        resumed_round = None if checkpoint is None else checkpoint.round
        folder = settings.run_folder
        state = stack.enter_context(RunState(folder, clock, resumed_round=resumed_round))
        broker = stack.enter_context(_broker(settings))
        presence = Presence(settings.run_id, clock)
        link = _link(broker, presence, clock, stack)
        link.start(coordinator_filters(settings.run_id), timeout_s=broker.connect_timeout_s)
        model = GlobalModel(settings, start.store, start.architecture)
        if checkpoint is not None:
            model.resume(checkpoint)
        fleet = _fleet(start, clock)
        graphs = GraphLibrary.of(settings, start.store, clock)
        stack.callback(graphs.close)
        reporter = _reporter(settings, link, clock, checkpoint=checkpoint)
        stack.callback(reporter.close)
        coordinator = Coordinator(
            settings,
            link=link,
            clock=clock,
            store=start.store,
            graphs=graphs,
            architecture=start.architecture,
            model=model,
            fleet=fleet,
            reporter=reporter,
            screening=_screening(start),
            lateness=_lateness(start),
            save_checkpoint=lambda saved: run_folder.save(settings, saved),
            next_round=1 if checkpoint is None else checkpoint.round + 1,
            presence=presence,
            listener=state,
        )
        health_file = health.HealthFile(settings.run_folder / health.FILE_NAME, clock)
        stack.callback(health_file.close)
        logger.info("ready for devices")
        _drive(coordinator, health_file, clock)
        link.close(presence.farewell)
        summary = reporter.summary()
        model.trainer = None  # room for what the export loads
        summary.save(settings.run_folder)
        _export(settings, model, summary)
        report_page.write_if_possible(settings.run_folder)
        return summary


def export(folder: Path, target: Path | None, *, merged: bool) -> Path:
    """Write the adapter (or the merged model) of a run's last checkpoint; return its folder.

    Raises:
        ConfigError: the folder is no run.
        StorageError: it has no whole checkpoint, or ``target`` cannot be written.
    """
    settings = run_folder.read_settings(folder)
    checkpoint = checkpoints.latest(folder / run_folder.CHECKPOINTS)
    if checkpoint is None:
        raise StorageError(f"{folder} has no checkpoint yet: nothing to export")
    tallies = Tallies.restored(checkpoint.state)
    card = _card(
        settings,
        rounds=checkpoint.round,
        steps=checkpoint.step,
        found=tallies,
        devices=[
            _card_device(name, plan, tallies.target_tokens.get(name, 0))
            for name, plan in sorted(tallies.plans.items())
        ],
    )
    name, revision = settings.model.name, settings.model.revision
    adapter = target if target is not None and not merged else folder / ADAPTER
    classifier = _classifier(settings, checkpoint.classifier)
    export_adapter(
        checkpoint.update, name, adapter, card=card, revision=revision, classifier=classifier
    )
    if not merged:
        return adapter
    classes = settings.training.classes or None
    return export_merged(
        adapter,
        name,
        target or folder / MERGED,
        revision=revision,
        classes=classes,
        int8_blocks=settings.training.int8_blocks,
    )


@dataclass(frozen=True, slots=True)
class _Start:
    """All that is known, and found to fit together, before anything is connected."""

    settings: CoordinatorSettings
    store: ModelStore
    architecture: ModelArchitecture
    checkpoint: Checkpoint | None


def _prepared(settings: CoordinatorSettings, *, resume: bool) -> _Start:
    checkpoint = run_folder.opened(settings.run_folder, resume=resume)
    store = ModelStore.of(settings)
    settings = _with_resolved_model(settings, store)
    settings = strategies.applied(settings, block_count=store.architecture.block_count)
    architecture = _checked_architecture(settings, store)
    if checkpoint is not None:
        run_folder.check_fits(checkpoint, settings, base=store.fingerprint)
    _warn_of_labels(settings)
    run_folder.write_settings(settings)
    return _Start(settings, store, architecture, checkpoint)


def _fleet(start: _Start, clock: Clock) -> Fleet:
    settings, store = start.settings, start.store

    def measure(micro_batch: int, length: int) -> Measurements:
        work = ServerWork.of(settings, store, micro_batch=micro_batch, length=length)
        return measure_server(work, clock, memory_bytes=settings.memory_limit)

    fleet = Fleet(settings, start.architecture, measure_server=measure)
    if start.checkpoint is not None:
        fleet.resume(start.checkpoint.state)
    return fleet


def _screening(start: _Start) -> Screening:
    screening = Screening(start.settings.aggregation.outlier_factor)
    if start.checkpoint is not None:
        screening.resume(start.checkpoint.state)
    return screening


def _lateness(start: _Start) -> Lateness:
    lateness = Lateness()
    if start.checkpoint is not None:
        lateness.resume(start.checkpoint.state)
    return lateness


def _with_resolved_model(settings: CoordinatorSettings, store: ModelStore) -> CoordinatorSettings:
    """Return the settings with the model's exact place: the run must find the same one again."""
    folder = store.folder
    name = folder.source if folder.revision is not None else str(folder.path.resolve())
    found = {"name": name, "revision": folder.revision}
    return settings.model_copy(update={"model": settings.model.model_copy(update=found)})


def _warn_of_labels(settings: CoordinatorSettings) -> None:
    if settings.training.labels == "server":
        classifies = settings.training.task == "classification"
        what = (
            "classes of their texts" if classifies else "tokens to predict, which are their text,"
        )
        logger.warning(
            "labels: server: the devices send the %s to this coordinator; labels: device keeps "
            "them at home",
            what,
        )


def _link(
    broker: BrokerSettings, presence: Presence, clock: Clock, stack: contextlib.ExitStack
) -> MessageLink:
    transport = MqttTransport(broker, client_name="hsplit-coordinator", will=presence.will)
    link = MessageLink(transport, clock)
    stack.callback(link.close)
    return link


def _checked_architecture(settings: CoordinatorSettings, store: ModelStore) -> ModelArchitecture:
    architecture = ModelArchitecture.from_config(store.config, settings.training)
    architecture.check_max_length(settings.training.max_length)
    adaptable_shapes(settings.lora, architecture)
    architecture.target_modules(settings.lora, blocks=range(architecture.block_count))
    for device, own in settings.plan.devices.items():
        try:
            if own.split_layer is not None:
                architecture.check_split_layer(own.split_layer)
            terms = settings.device_terms(device)
            architecture.target_modules(terms.lora, blocks=range(architecture.block_count))
        except HsplitError as error:
            raise type(error)(f"plan.devices.{device}: {error}") from error
    if settings.plan.split_layer is not None:
        architecture.check_split_layer(settings.plan.split_layer)
    return architecture


@contextlib.contextmanager
def _broker(settings: CoordinatorSettings) -> Iterator[BrokerSettings]:
    if settings.broker is not None:
        yield settings.broker
        return
    wanted = settings.embedded_broker
    with EmbeddedBroker(wanted.host, wanted.port, prefer=wanted.prefer) as broker:
        yield BrokerSettings(url=broker.url)


def _reporter(
    settings: CoordinatorSettings, link: MessageLink, clock: Clock, *, checkpoint: Checkpoint | None
) -> Reporter:
    writer = MetricsWriter(
        settings.run_folder,
        clock,
        tensorboard="tensorboard" in settings.report_to,
        resumed_step=None if checkpoint is None else checkpoint.step,
    )
    resumed_step = None if checkpoint is None else checkpoint.step
    return Reporter(
        writer,
        link,
        clock,
        total_steps=settings.total_steps,
        tallies=Tallies() if checkpoint is None else Tallies.restored(checkpoint.state),
        journal=Journal(settings.run_folder, clock, resumed_step),
    )


def _drive(coordinator: Coordinator, health_file: health.HealthFile, clock: Clock) -> None:
    try:
        while not coordinator.finished:
            coordinator.turn(IDLE_WAIT_S)
            health_file.progress(coordinator.phase)
    except HsplitError as error:
        coordinator.members.say_finished(f"the run ended early: {error}", failed=True)
        raise
    coordinator.members.say_finished(RUN_COMPLETE, failed=False)
    deadline = clock.monotonic_s() + GOODBYE_S
    while len(coordinator.members.registry) and clock.monotonic_s() < deadline:
        coordinator.turn(IDLE_WAIT_S)


def _export(settings: CoordinatorSettings, model: GlobalModel, summary: Summary) -> None:
    devices = [_card_device(name, one, one.target_tokens) for name, one in summary.devices.items()]
    card = _card(
        settings,
        rounds=settings.rounds.count,
        steps=summary.steps,
        found=summary,
        devices=devices,
    )
    folder = settings.run_folder
    name, revision = settings.model.name, settings.model.revision
    classifier = _classifier(settings, model.classifier.weights)
    export_adapter(
        model.update, name, folder / ADAPTER, card=card, revision=revision, classifier=classifier
    )
    if settings.export.merged:
        classes = settings.training.classes or None
        export_merged(
            folder / ADAPTER,
            name,
            folder / MERGED,
            revision=revision,
            classes=classes,
            int8_blocks=settings.training.int8_blocks,
        )
    logger.info("adapter: %s, summary: %s", folder / ADAPTER, folder / SUMMARY_FILE)


def _classifier(
    settings: CoordinatorSettings, weights: ClassifierTensors
) -> TrainedClassifier | None:
    classes = settings.training.classes
    return TrainedClassifier(classes=classes, weights=weights) if weights else None


def _card_device(name: str, one: DeviceSummary, target_tokens: int) -> CardDevice:
    return CardDevice(
        device=name,
        split_layer=one.split_layer,
        ranks=sorted(set(one.ranks.values())),
        target_tokens=target_tokens,
    )


def _card(
    settings: CoordinatorSettings,
    *,
    rounds: int,
    steps: int,
    found: Tallies | Summary,
    devices: list[CardDevice],
) -> ModelCard:
    return ModelCard(
        base_model=settings.model.name,
        run_id=settings.run_id,
        strategy=f"{settings.strategy}, {strategies.STRATEGIES[settings.strategy].paper}",
        hand_back=settings.aggregation.hand_back,
        labels=settings.training.labels,
        rounds=rounds,
        steps=steps,
        devices=devices,
        perplexity_before=found.perplexity_before,
        perplexity_after=found.perplexity_after,
        classes=settings.training.classes,
        int8_blocks=settings.training.int8_blocks,
        accuracy_before=found.accuracy_before,
        accuracy_after=found.accuracy_after,
        f1_before=found.f1_before,
        f1_after=found.f1_after,
    )
