"""A device measures itself: compute once, by a probe; usable memory and the link each time."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

from edge_agent.backends import PACKAGES, chosen_backend
from edge_agent.backends.base import Backend
from edge_agent.probe_spec import ProbeSpec
from edge_agent.probing import ProbeResult, probe
from edge_agent.profile_cache import ProfileCache, ProfileKey, length_bucket
from edge_agent.sensors import Sensors
from edge_agent.settings import DeviceSettings
from shared import version
from shared.architecture import ModelArchitecture
from shared.errors import TransportError
from shared.memory_use import resident_bytes, trim
from shared.probe_loads import MOST_BLOCKS
from shared.protocol.messages import DeviceId
from shared.protocol.profile import LinkMeasurement, Measurements
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

logger = logging.getLogger(__name__)

BUSY_SPREAD = 1.0
"""From here on other programs decided what was measured, and it is not kept for later."""

MeasureLink: TypeAlias = Callable[[], LinkMeasurement | None]
"""None: it could not be measured, and that may be so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Who measures, and what with; as in the agent's settings.

    ``memory_limit`` in bytes: what training may use at most, whatever the sensors say.
    ``computes_with`` and ``accelerated`` (on a GPU), as `Backend` has them: what was found to work,
    which need not be what is there; None: nothing was opened yet.
    """

    device_id: DeviceId
    backend: str
    device: str = "auto"
    threads: int | None = None
    emulate: str | None = None
    memory_limit: int | None = None
    computes_with: str | None = None
    accelerated: bool | None = None

    @classmethod
    def of(cls, settings: DeviceSettings, backend: Backend | None = None) -> Machine:
        """Return what these settings say, and the backend that they opened, if they did."""
        return cls(
            device_id=DeviceId(settings.device_id),
            backend=settings.backend,
            device=settings.device,
            threads=settings.threads,
            emulate=settings.emulate,
            memory_limit=settings.least_memory,
            computes_with=None if backend is None else backend.computes_with,
            accelerated=None if backend is None else backend.accelerator is not None,
        )

    @property
    def backend_name(self) -> str:
        """The backend by its own name, where ``backend`` is ``auto``.

        Raises:
            ConfigError: none is installed.
        """
        return chosen_backend(self.backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureRequest:
    """What to measure: a model under a run's terms, ``micro_batch`` sequences of ``length``.

    ``graphs``: what the backend computes with, by name, if it does.
    """

    config_json: str
    training: TrainingTerms
    lora: LoraTerms
    optimizer: OptimizerTerms
    micro_batch: int
    length: int
    graphs: Mapping[str, Path] = field(default_factory=dict)


class Profiler:
    """Makes `Measurements`. Belongs to one thread, which `measure` blocks for half a minute.

    ``measure_link`` None: there is no link to measure. ``run_probe`` measures compute.
    """

    def __init__(
        self,
        machine: Machine,
        sensors: Sensors,
        cache: ProfileCache,
        *,
        measure_link: MeasureLink | None,
        run_probe: Callable[[ProbeSpec], ProbeResult] = probe,
    ) -> None:
        """Take the parts; nothing is measured yet."""
        self._machine = machine
        self._sensors = sensors
        self._cache = cache
        self._measure_link = measure_link
        self._run_probe = run_probe
        self._known: dict[ProfileKey, Measurements] = {}

    def pieces(self, request: MeasureRequest, *, fresh: bool = False) -> tuple[str, ...]:
        """Return the pieces of the base model that `measure` needs: none if the cache will do.

        Raises:
            ModelError: the architecture is not supported.
        """
        architecture = _architecture(request)
        key = self._key(request, architecture)
        if not fresh and (key in self._known or self._remembered(key) is not None):
            return ()
        return architecture.front_pieces(
            _blocks(architecture), head_on_device=request.training.labels == "device"
        )

    def measure(
        self, request: MeasureRequest, files: Mapping[str, Path], *, fresh: bool = False
    ) -> Measurements:
        """Return what this device measures; ``files`` are those of `pieces`.

        With ``fresh`` nothing is taken from before. At first to be called while this process
        holds no part of a model: what it has of memory then counts as what the program takes
        without one. Later calls, when it may hold one, say the same of it again.

        Raises:
            PlanError: the memory is too small for a single block, or it took too long.
            ModelError: the pieces are not of this model, or its architecture is not supported.
            ConfigError: no such device or backend, or no way to measure memory here.
            TransportError: the link could not be measured.
        """
        architecture = _architecture(request)
        architecture.check_max_length(request.length)
        # First the link: it takes less time, and more often there is something wrong with it.
        link = None if self._measure_link is None else self._measure_link()
        key = self._key(request, architecture)
        known = None if fresh else self._known.get(key)
        if known is None:
            known = self._known[key] = self._found(request, files, architecture, key, fresh=fresh)
        return replace(known, memory_bytes=self.memory_bytes(on_gpu=known.on_gpu), link=link)

    def memory_bytes(self, *, on_gpu: bool) -> int | None:
        """Return what training may use in all: what is there now, at most the owner's limit."""
        found = (self._sensors.memory_bytes(on_gpu=on_gpu), self._machine.memory_limit)
        return min((one for one in found if one is not None), default=None)

    def _found(
        self,
        request: MeasureRequest,
        files: Mapping[str, Path],
        architecture: ModelArchitecture,
        key: ProfileKey,
        *,
        fresh: bool,
    ) -> Measurements:
        known = None if fresh else self._remembered(key)
        if known is None:
            return self._computed(request, files, architecture, key)
        logger.info("measured before: compute and memory are from the cache")
        return _grown(known)

    def _remembered(self, key: ProfileKey) -> Measurements | None:
        """Return what was measured before, if the same computed then as now.

        A GPU's libraries may have failed to load then, or now.
        """
        known, now = self._cache.load(key), self._machine.computes_with
        return None if known is not None and now not in (None, known.computes_with) else known

    def _computed(
        self,
        request: MeasureRequest,
        files: Mapping[str, Path],
        architecture: ModelArchitecture,
        key: ProfileKey,
    ) -> Measurements:
        logger.info(
            "measuring this device at micro-batches of %d x %d tokens",
            request.micro_batch,
            request.length,
        )
        result = self._run_probe(self._spec(request, files))
        found = self._measurements(result, request, architecture)
        if (spread := typical_spread(found)) <= BUSY_SPREAD:
            self._cache.save(key, found)
        else:
            logger.warning(
                "this device was busy while it was measured: repeats of one thing differ by "
                "%.0f %%; the next start measures again",
                spread * 100,
            )
        return found

    def _measurements(
        self, result: ProbeResult, request: MeasureRequest, architecture: ModelArchitecture
    ) -> Measurements:
        return Measurements(
            hsplit_version=version.VERSION,
            backend=self._machine.backend_name,
            dtype=request.training.dtype,
            threads=self._machine.threads,
            model=architecture.fingerprint,
            on_gpu=result.on_gpu,
            runtime_bytes=result.runtime_bytes,
            blocks=result.blocks,
            head=result.head,
            optimizer=result.optimizer,
            computes_with=result.computes_with,
        )

    def _spec(self, request: MeasureRequest, files: Mapping[str, Path]) -> ProbeSpec:
        machine, on_gpu = self._machine, self._machine.accelerated
        if on_gpu is None:
            on_gpu = machine.device != "cpu" and self._sensors.facts().accelerator is not None
        return ProbeSpec(
            backend=machine.backend_name,
            device=None if machine.device == "auto" else machine.device,
            threads=machine.threads,
            emulate=machine.emulate,
            config_json=request.config_json,
            files=files,
            device_id=machine.device_id,
            training=request.training,
            lora=request.lora,
            optimizer=request.optimizer,
            micro_batch=request.micro_batch,
            length=request.length,
            memory_bytes=self.memory_bytes(on_gpu=on_gpu),
            graphs=request.graphs,
        )

    def _key(self, request: MeasureRequest, architecture: ModelArchitecture) -> ProfileKey:
        machine, training, lora = self._machine, request.training, request.lora
        facts = self._sensors.facts()
        return ProfileKey(
            device_id=machine.device_id,
            model=architecture.fingerprint,
            blocks=_blocks(architecture),
            backend=machine.backend_name,
            device=machine.device,
            accelerator=facts.accelerator,
            power_mode=facts.power_mode,
            cpus=facts.cpus,
            threads=machine.threads,
            emulate=machine.emulate,
            dtype=training.dtype,
            int8_blocks=training.int8_blocks,
            wire_dtype=training.wire_dtype,
            labels=training.labels,
            targets=architecture.class_count,
            optimizer=request.optimizer.name,
            target_modules=lora.target_modules or architecture.family.default_targets,
            lora_dropout=lora.lora_dropout > 0,
            micro_batch=request.micro_batch,
            length=length_bucket(request.length),
            hsplit_version=version.VERSION,
            backend_version=_installed(PACKAGES[machine.backend_name][0]),
        )


def typical_spread(found: Measurements) -> float:
    """Return the median spread of the points of blocks: how far repeats differ."""
    return statistics.median(point.spread for point in found.blocks)


def tolerant(measure_link: MeasureLink) -> MeasureLink:
    """Return ``measure_link`` that gives None, and a warning, where it fails.

    For an agent whose connection to the coordinator stands: that it could not be measured is
    no reason not to train.
    """

    def measured() -> LinkMeasurement | None:
        try:
            return measure_link()
        except TransportError as error:
            logger.warning("the link is not known to the plan: %s", error)
            return None

    return measured


def _architecture(request: MeasureRequest) -> ModelArchitecture:
    return ModelArchitecture.from_config(json.loads(request.config_json), request.training)


def _blocks(architecture: ModelArchitecture) -> int:
    return min(MOST_BLOCKS, architecture.block_count)


def _installed(package: str) -> str:
    """Return the version of a package, without importing it; empty if it is not installed.

    It may come under another name: builds of onnxruntime for a GPU do.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        found = set(metadata.packages_distributions().get(package, ()))
        return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(found))


def _grown(known: Measurements) -> Measurements:
    """Return measurements as they would be now, where this program has more of its own by now.

    Text that was loaded since, say. On a GPU with memory of its own that does not matter.
    """
    if known.on_gpu:
        return known
    trim()
    more = max(0, resident_bytes() - known.runtime_bytes)
    return replace(
        known,
        runtime_bytes=known.runtime_bytes + more,
        blocks=tuple(replace(one, peak_bytes=one.peak_bytes + more) for one in known.blocks),
    )
