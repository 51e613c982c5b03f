"""A run's folder: its lock, its settings, the checkpoint to go on from."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from coordinator import checkpoints
from coordinator.checkpoints import Checkpoint
from coordinator.settings import CoordinatorSettings
from shared.atomic import replace_file
from shared.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
STATE_BASE = "base"


def with_last_run(settings: CoordinatorSettings) -> CoordinatorSettings:
    """Return the settings with the id of the latest run on this model, where none is given.

    Ids that are made here begin with the date, so the last by name is the latest.
    """
    if settings.run.id is not None:
        return settings
    name = settings.with_run_id(0.0).run_id.split("-", 2)[2]
    dated = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(name)}")
    runs = sorted(
        path.parent.name
        for path in settings.run.folder.glob(f"*/{CHECKPOINTS}")
        if dated.fullmatch(path.parent.name)
    )
    if not runs:
        return settings
    logger.info("run.id is not given: the latest run on this model is %s", runs[-1])
    return settings.model_copy(update={"run": settings.run.model_copy(update={"id": runs[-1]})})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep every other coordinator out of it meanwhile.

    Raises:
        StorageError: it cannot be made or written.
        ConfigError: another coordinator is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("wb")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another coordinator is at work on {folder}: stop it, or choose another run.id"
            ) from error
        yield


def opened(folder: Path, *, resume: bool) -> Checkpoint | None:
    """Return the checkpoint to go on from; None for a run from the beginning.

    Raises:
        ConfigError: there are checkpoints, and nobody said what to do with them.
        StorageError: there are, but none can be read.
    """
    checkpoint = checkpoints.latest(folder / CHECKPOINTS)
    exists = checkpoint is not None or any(folder.glob(f"{CHECKPOINTS}/round-*"))
    if exists and not resume:
        raise ConfigError(f"run {folder} exists: add --resume to go on, or choose another run.id")
    if exists and checkpoint is None:
        raise StorageError(
            f"none of the checkpoints in {folder / CHECKPOINTS} can be read: restore one, or "
            "choose another run.id to begin anew"
        )
    if checkpoint is not None:
        logger.info("resuming %s after round %d", folder, checkpoint.round)
    elif resume:
        logger.info("%s has no checkpoint to resume from: starting from the beginning", folder)
    return checkpoint


def check_fits(checkpoint: Checkpoint, settings: CoordinatorSettings, *, base: str) -> None:
    """Raise ConfigError where a checkpoint is of another base model or another grid of steps."""
    if checkpoint.state[STATE_BASE] != base:
        raise ConfigError(
            f"{settings.run_folder} was trained on other weights than {settings.model.name} has "
            "now: put the same model (model.revision) back, or choose another run.id"
        )
    steps = settings.rounds.steps
    if checkpoint.step != checkpoint.round * steps:
        raise ConfigError(
            f"{settings.run_folder} took {checkpoint.step} steps in {checkpoint.round} rounds, so "
            f"rounds.steps cannot be {steps} now"
        )


def save(settings: CoordinatorSettings, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into the run's folder."""
    checkpoints.save(settings.run_folder / CHECKPOINTS, checkpoint, keep=settings.checkpoints.keep)


def write_settings(settings: CoordinatorSettings) -> None:
    """Write all settings as they hold, without secrets."""
    text = yaml.safe_dump(settings.resolved(), sort_keys=False)
    replace_file(settings.run_folder / RUN_FILE, text.encode())


def read_settings(folder: Path) -> CoordinatorSettings:
    """Return the settings of the run in ``folder``.

    Raises:
        ConfigError: the folder is no run.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise ConfigError(f"{folder} is no run folder: it has no {RUN_FILE}")
    return CoordinatorSettings.load(file=file, environment={})
