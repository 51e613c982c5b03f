"""``hsplit-coordinator plan``: what a run would do with devices whose profiles lie in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordinator import strategies
from coordinator.model_folder import find_model, read_texts
from coordinator.planning.conditions import Conditions, FleetDevice
from coordinator.planning.planner import FleetPlan, plan_fleet
from coordinator.settings import CoordinatorSettings
from shared import profile_file
from shared.architecture import ModelArchitecture
from shared.clock import Clock
from shared.errors import ConfigError
from shared.protocol.messages import DeviceId
from shared.protocol.profile import Measurements, ProfileFile


def plan(
    settings: CoordinatorSettings,
    profiles: Sequence[Path],
    *,
    server_profile: Path | None,
    clock: Clock,
) -> FleetPlan:
    """Return the plan that these devices would begin with: nothing is known of importance yet.

    Without ``server_profile`` this machine measures itself, which takes seconds.

    Raises:
        ConfigError: a file is no profile, or is of another model, dtype or version, or two are of
            one device.
        ModelError: the model is not there.
        PlanError: nobody can take part.
    """
    model = find_model(settings.model.name, revision=settings.model.revision)
    architecture = ModelArchitecture.from_config(read_texts(model).config, settings.training)
    settings = strategies.applied(settings, block_count=architecture.block_count)
    architecture.check_max_length(settings.training.max_length)
    architecture.check_int8_blocks(settings.training.int8_blocks)
    read = {path: _read(path, architecture, settings) for path in profiles}
    _check_devices(read)
    devices = [
        FleetDevice(
            device_id=device_id,
            terms=settings.device_terms(device_id),
            measurements=profile.measurements,
            data=profile.data,
        )
        for profile in read.values()
        for device_id in [DeviceId(profile.device_id)]
    ]
    if server_profile is None:
        server = _measured_server(settings, clock)
    else:
        server = _read(server_profile, architecture, settings).measurements
    return plan_fleet(devices, Conditions.of(settings, architecture, server=server))


def _read(
    path: Path, architecture: ModelArchitecture, settings: CoordinatorSettings
) -> ProfileFile:
    profile = profile_file.read(path)
    found = profile.measurements
    if found.model != architecture.fingerprint:
        raise ConfigError(
            f"profile {path} ({profile.device_id}) is of another model than {settings.model.name}: "
            f"measure again, hsplit-agent profile --model {settings.model.name}"
        )
    if found.dtype != settings.training.dtype:
        raise ConfigError(
            f"profile {path} ({profile.device_id}) was measured in {found.dtype}, but "
            f"training.dtype is {settings.training.dtype}: measure again in that"
        )
    return profile


def _check_devices(read: dict[Path, ProfileFile]) -> None:
    paths: dict[str, Path] = {}
    for path, profile in read.items():
        if profile.device_id in paths:
            raise ConfigError(
                f"profiles {paths[profile.device_id]} and {path} are both of device "
                f"{profile.device_id}: give each device one"
            )
        paths[profile.device_id] = path


def _measured_server(settings: CoordinatorSettings, clock: Clock) -> Measurements:
    # Inside: with profiles of all there is no need of torch, which takes seconds to import.
    import torch  # noqa: PLC0415

    from coordinator.model_store import ModelStore  # noqa: PLC0415
    from coordinator.server_measuring import ServerWork, measure_server  # noqa: PLC0415

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    work = ServerWork.of(
        settings,
        ModelStore.of(settings),
        micro_batch=settings.device_terms(DeviceId("any")).micro_batch,
        length=settings.training.max_length,
    )
    return measure_server(work, clock, memory_bytes=settings.memory_limit)
