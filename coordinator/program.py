"""From settings to a finished run: builds the parts, drives the loop, writes the results."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from coordinator import checkpoints
from coordinator.checkpoints import Checkpoint
from coordinator.coordinator import RUN_COMPLETE, Coordinator
from coordinator.embedded_broker import EmbeddedBroker
from coordinator.export import export_adapter, export_merged
from coordinator.global_model import GlobalModel
from coordinator.metrics import SUMMARY_FILE, DeviceSummary, MetricsWriter, Summary
from coordinator.model_card import CardDevice, ModelCard
from coordinator.model_store import ModelStore
from coordinator.planner import adaptable_shapes
from coordinator.reporting import Reporter, Tallies
from coordinator.settings import CoordinatorSettings
from shared import health, logs
from shared.architecture import ModelArchitecture
from shared.atomic import replace_file
from shared.clock import Clock
from shared.config import BrokerSettings, base_folder
from shared.errors import ConfigError, HsplitError, StorageError
from shared.protocol.topics import COORDINATOR_STATUS, coordinator_filters
from shared.transport.base import Will
from shared.transport.link import MessageLink
from shared.transport.mqtt import MqttTransport

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MERGED = "merged"
IDLE_WAIT_S = 0.5
GOODBYE_S = 10.0


def run(settings: CoordinatorSettings, clock: Clock, *, resume: bool) -> Summary:
    """Carry out a run and return its summary; its folder then holds the adapter.

    Raises:
        HsplitError: it cannot start, or cannot go on; the last checkpoint remains.
    """
    settings = settings.with_run_id(clock.wall_s())
    folder = settings.run_folder
    checkpoint = _open_folder(folder, resume=resume)
    logs.bind(run_id=settings.run_id)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    store = ModelStore.open(
        settings.model.name,
        revision=settings.model.revision,
        cache_folder=base_folder("XDG_CACHE_HOME", "~/.cache") / "hsplit" / "pieces",
    )
    architecture = _checked_architecture(settings, store)
    if settings.training.labels == "server":
        logger.warning(
            "labels: server: the devices send the tokens to predict, which are their text, to "
            "this coordinator; labels: device keeps them at home"
        )
    replace_file(folder / RUN_FILE, yaml.safe_dump(settings.resolved(), sort_keys=False).encode())
    with _broker(settings) as broker, contextlib.ExitStack() as stack:
        transport = MqttTransport(broker, client_name="hsplit-coordinator", will=_will(settings))
        link = MessageLink(transport, clock)
        stack.callback(link.close)
        link.start(coordinator_filters(settings.run_id), timeout_s=broker.connect_timeout_s)
        model = GlobalModel(settings, store, architecture)
        if checkpoint is not None:
            model.resume(checkpoint)
        reporter = _reporter(settings, link, clock, checkpoint=checkpoint)
        stack.callback(reporter.close)
        coordinator = Coordinator(
            settings,
            link=link,
            clock=clock,
            store=store,
            architecture=architecture,
            model=model,
            reporter=reporter,
            save_checkpoint=lambda saved: _save(settings, saved),
            next_round=1 if checkpoint is None else checkpoint.round + 1,
        )
        health_file = health.HealthFile(folder / health.FILE_NAME, clock)
        stack.callback(health_file.close)
        _drive(coordinator, health_file, clock)
        summary = reporter.summary()
    summary.save(folder)
    _export(settings, model, summary)
    return summary


def export(run_folder: Path, target: Path | None, *, merged: bool) -> Path:
    """Write the adapter (or the merged model) of a run's last checkpoint; return its folder.

    Raises:
        ConfigError: the folder is no run.
        StorageError: it has no whole checkpoint, or ``target`` cannot be written.
    """
    run_file = run_folder / RUN_FILE
    if not run_file.exists():
        raise ConfigError(f"{run_folder} is no run folder: it has no {RUN_FILE}")
    settings = CoordinatorSettings.load(file=run_file, environment={})
    checkpoint = checkpoints.latest(run_folder / CHECKPOINTS)
    if checkpoint is None:
        raise StorageError(f"{run_folder} has no checkpoint yet: nothing to export")
    tallies = Tallies.restored(checkpoint.state)
    card = _card(
        settings,
        rounds=checkpoint.round,
        steps=checkpoint.step,
        before=tallies.perplexity_before,
        after=tallies.perplexity_after,
        devices=[
            _card_device(name, plan, tallies.target_tokens.get(name, 0))
            for name, plan in sorted(tallies.plans.items())
        ],
    )
    name, revision = settings.model.name, settings.model.revision
    adapter = target if target is not None and not merged else run_folder / ADAPTER
    export_adapter(checkpoint.update, name, adapter, card=card, revision=revision)
    if not merged:
        return adapter
    folder = target if target is not None else run_folder / MERGED
    return export_merged(adapter, name, folder, revision=revision)


def _open_folder(folder: Path, *, resume: bool) -> Checkpoint | None:
    checkpoint = checkpoints.latest(folder / CHECKPOINTS)
    if resume:
        if checkpoint is None:
            raise ConfigError(
                f"{folder} holds no checkpoint to resume from: start without --resume"
            )
        logger.info("resuming %s after round %d", folder, checkpoint.round)
    elif checkpoint is not None:
        raise ConfigError(f"run {folder} exists: add --resume to go on, or choose another run.id")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}") from error
    return checkpoint


def _checked_architecture(settings: CoordinatorSettings, store: ModelStore) -> ModelArchitecture:
    architecture = ModelArchitecture.from_config(store.config)
    architecture.check_max_length(settings.training.max_length)
    adaptable_shapes(settings.lora, architecture)
    architecture.target_modules(settings.lora, blocks=range(architecture.block_count))
    for device, own in settings.plan.devices.items():
        try:
            if own.split_layer is not None:
                architecture.check_split_layer(own.split_layer)
            terms = settings.device(device)
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
        logger.info(
            "embedded broker (%s) at %s, without passwords or encryption: for one machine and "
            "first steps; for anything real set broker.url",
            broker.kind,
            broker.url,
        )
        yield BrokerSettings(url=broker.url)


def _will(settings: CoordinatorSettings) -> Will:
    def notice(state: str) -> bytes:
        return json.dumps({"state": state, "run_id": settings.run_id}).encode()

    return Will(COORDINATOR_STATUS, birth=notice("online"), death=notice("offline"))


def _reporter(
    settings: CoordinatorSettings, link: MessageLink, clock: Clock, *, checkpoint: Checkpoint | None
) -> Reporter:
    writer = MetricsWriter(
        settings.run_folder,
        clock,
        tensorboard="tensorboard" in settings.report_to,
        resumed_step=None if checkpoint is None else checkpoint.step,
    )
    tallies = Tallies() if checkpoint is None else Tallies.restored(checkpoint.state)
    return Reporter(writer, link, clock, total_steps=settings.total_steps, tallies=tallies)


def _save(settings: CoordinatorSettings, checkpoint: Checkpoint) -> None:
    checkpoints.save(settings.run_folder / CHECKPOINTS, checkpoint, keep=settings.checkpoints.keep)


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
        before=summary.perplexity_before,
        after=summary.perplexity_after,
        devices=devices,
    )
    folder = settings.run_folder
    name, revision = settings.model.name, settings.model.revision
    export_adapter(model.update, name, folder / ADAPTER, card=card, revision=revision)
    if settings.export.merged:
        export_merged(folder / ADAPTER, name, folder / MERGED, revision=revision)
    logger.info("adapter: %s, summary: %s", folder / ADAPTER, folder / SUMMARY_FILE)


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
    before: float | None,
    after: float | None,
    devices: list[CardDevice],
) -> ModelCard:
    return ModelCard(
        base_model=settings.model.name,
        run_id=settings.run_id,
        hand_back=settings.aggregation.hand_back,
        labels=settings.training.labels,
        rounds=rounds,
        steps=steps,
        devices=devices,
        perplexity_before=before,
        perplexity_after=after,
    )
