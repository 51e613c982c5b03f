"""What ``hsplit-agent profile`` does: from its settings to what was found out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_agent import link_probe
from edge_agent.emulation import link_of
from edge_agent.local_graphs import graphs_of
from edge_agent.local_model import LocalModel, open_model
from edge_agent.profile_cache import FOLDER, ProfileCache
from edge_agent.profiler import Machine, MeasureLink, MeasureRequest, Profiler
from edge_agent.sensors import open_sensors
from edge_agent.settings import DeviceSettings, ProfileSettings
from shared import logs, profile_file
from shared.clock import Clock
from shared.errors import ConfigError, PlanError, StorageError
from shared.protocol.messages import DeviceId
from shared.protocol.profile import (
    DataShape,
    DeviceFacts,
    LinkMeasurement,
    Measurements,
    ProfileFile,
    Telemetry,
)
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is known of a device without a model, and of one model where there is one.

    ``memory_bytes``: what training may use.
    """

    device_id: str
    machine: str
    facts: DeviceFacts
    telemetry: Telemetry
    memory_bytes: int | None = None
    link: LinkMeasurement | None = None
    measured: Measured | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model's measurements, at micro-batches of ``micro_batch`` sequences of ``length``.

    ``computes_on``: the accelerator's name, or the CPU.
    """

    model: str
    blocks: int
    computes_on: str
    micro_batch: int
    length: int
    profile: ProfileFile

    @property
    def measurements(self) -> Measurements:
        """What was measured."""
        return self.profile.measurements


def run(settings: ProfileSettings, clock: Clock, *, fresh: bool, output: Path | None) -> Found:
    """Measure this device, for the model of the settings if they name one.

    ``fresh``: also what was measured before. The profile is written to ``output``, if given.

    Raises:
        HsplitError: the model cannot be found or is too long, the broker cannot be reached, the
            memory is too small, and so on.
    """
    logs.bind(device_id=settings.device_id)
    if output is not None and settings.model is None:
        raise ConfigError("--output writes what was measured for a model: add --model")
    # First the model: a wrong name is found before anything is measured.
    model = None if settings.model is None else open_model(settings.model)
    graphs = graphs_of(settings, model)
    if model is not None:
        _check_length(settings.length, model)
    with contextlib.closing(open_sensors(gpu=settings.gpu)) as sensors:
        link = _link(settings, clock)
        profiler = Profiler(
            Machine.of(settings),
            sensors,
            ProfileCache(settings.state / FOLDER),
            measure_link=link,
        )
        facts = sensors.facts()
        on_gpu = _accelerator(settings, facts) is not None
        found = Found(
            device_id=settings.device_id,
            machine=f"{platform.machine()} {platform.system()}",
            facts=facts,
            telemetry=sensors.read(on_gpu=on_gpu),
            memory_bytes=profiler.memory_bytes(on_gpu=on_gpu),
        )
        if model is None:
            return dataclasses.replace(found, link=None if link is None else link())
        request = _request(model, settings, graphs)
        measurements = _measured(profiler, model, request, settings.cache_folder, fresh=fresh)
    measured = _as_measured(found, model, settings, measurements)
    if output is not None:
        profile_file.write(output, measured.profile)
        logger.info("profile written to %s", output)
    return dataclasses.replace(
        found,
        memory_bytes=measurements.memory_bytes,
        link=measurements.link,
        measured=measured,
    )


def _check_length(length: int, model: LocalModel) -> None:
    positions = model.architecture.max_positions
    if length > positions:
        raise PlanError(
            f"length (--length) is {length} tokens, but {model.name} has {positions} positions: "
            f"choose at most {positions}"
        )


def _link(settings: ProfileSettings, clock: Clock) -> MeasureLink | None:
    if settings.broker is None:
        return None
    device = DeviceId(settings.device_id)
    emulated = link_of(settings.emulation)
    return link_probe.measurer(settings.broker, device, clock=clock, emulated=emulated)


def _request(
    model: LocalModel, settings: ProfileSettings, graphs: Mapping[str, Path]
) -> MeasureRequest:
    return MeasureRequest(
        config_json=model.config_json,
        training=TrainingTerms(
            task=model.architecture.task,
            # An encoder can only classify; their number changes next to nothing.
            classes=tuple(str(n) for n in range(model.architecture.class_count)),
            labels=settings.labels,
            dtype=settings.dtype,
            max_length=max(2, settings.length),
        ),
        lora=LoraTerms(),
        optimizer=OptimizerTerms(),
        micro_batch=settings.micro_batch,
        length=settings.length,
        graphs=graphs,
    )


def _measured(
    profiler: Profiler, model: LocalModel, request: MeasureRequest, cache: Path, *, fresh: bool
) -> Measurements:
    names = profiler.pieces(request, fresh=fresh)
    if not names:
        return profiler.measure(request, {})
    with _scratch(cache) as scratch:
        files = model.piece_files(names, scratch=scratch)
        return profiler.measure(request, files, fresh=fresh)


def _accelerator(settings: DeviceSettings, facts: DeviceFacts) -> str | None:
    return None if settings.device == "cpu" else facts.accelerator


def _computes_on(measurements: Measurements, facts: DeviceFacts) -> str:
    """Return the GPU's name, or the CPU: a backend may have found no way to the GPU."""
    on_gpu = measurements.on_gpu or facts.accelerator_shares_memory
    return (facts.accelerator if on_gpu else None) or "the CPU"


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Make a folder for a while, on the disk that keeps weights: /tmp is often memory."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="profile-", dir=parent)
    except OSError as error:
        raise StorageError(
            f"cache_folder {parent} cannot be written: {error.strerror}; choose another"
        ) from error
    with folder as name:
        yield Path(name)


def _as_measured(
    found: Found, model: LocalModel, settings: ProfileSettings, measurements: Measurements
) -> Measured:
    profile = ProfileFile(
        device_id=found.device_id,
        machine=found.machine,
        facts=found.facts,
        data=DataShape(
            mean_length=settings.length, padded_length=settings.length, longest=settings.length
        ),
        measurements=measurements,
    )
    return Measured(
        model=model.name,
        blocks=model.architecture.block_count,
        computes_on=_computes_on(measurements, found.facts),
        micro_batch=settings.micro_batch,
        length=settings.length,
        profile=profile,
    )
