"""What an agent can be told: `AgentSettings`, and `ProfileSettings` for measuring alone."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, Field, StringConstraints

from edge_agent.emulation import Emulation, parse_emulation
from shared import health
from shared.config import (
    BrokerSettings,
    HsplitSettings,
    MemoryLimit,
    PositiveInt,
    UserPath,
    base_folder,
)
from shared.errors import ConfigError
from shared.protocol.messages import Device, DeviceId
from shared.terms import ComputeDtype, LabelMode


def _cache_folder() -> Path:
    return base_folder("XDG_CACHE_HOME", "~/.cache") / "hsplit"


def default_state_folder(device_id: str) -> Path:
    """Return the folder of a device's own state, where its settings name none."""
    return base_folder("XDG_STATE_HOME", "~/.local/state") / "hsplit" / device_id


AgentDevice: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^(auto|cpu|(cuda|tensorrt)(:\d{1,3})?)$")
]
"""Where a backend computes; ``auto``: on the GPU where there is one, else on the CPU."""


def _check_emulation(text: str) -> str:
    try:
        parse_emulation(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


class DeviceSettings(HsplitSettings):
    """What the owner of a device decides of it, whatever it is to do.

    ``cache_folder`` keeps the base weights and may be shared by agents, and shrinks to
    ``cache_limit`` where one is given; ``state_folder`` belongs to one agent alone.
    ``backend`` is what computes (auto: torch where it is installed, else onnx); ``device`` where
    it computes (auto: on the GPU where there is one; tensorrt is for onnx, and by name alone);
    ``threads`` the CPU threads (None: the backend's choice). ``memory_limit`` is what training
    may use. ``emulate`` plays a smaller device (`edge_agent.emulation`).
    """

    device_id: Device
    cache_folder: UserPath = Field(default_factory=_cache_folder)
    cache_limit: MemoryLimit | None = None
    state_folder: UserPath | None = None
    backend: Literal["auto", "torch", "onnx"] = "auto"
    device: AgentDevice = "auto"
    memory_limit: MemoryLimit | None = None
    threads: Annotated[int, Ge(1), Le(1024)] | None = None
    emulate: Annotated[str, AfterValidator(_check_emulation)] | None = None

    @property
    def emulation(self) -> Emulation | None:
        """The smaller device to play; None: none."""
        return None if self.emulate is None else parse_emulation(self.emulate)

    @property
    def least_memory(self) -> int | None:
        """What training may use: the owner's limit, or the played device's memory if smaller."""
        played = None if self.emulation is None else self.emulation.memory_bytes
        return min((int(one) for one in (self.memory_limit, played) if one), default=None)

    @property
    def gpu(self) -> int | None:
        """CUDA's number of the GPU to compute on, should there be one; None: the CPU is wanted."""
        return None if self.device == "cpu" else int(self.device.partition(":")[2] or 0)

    @property
    def state(self) -> Path:
        """The folder of this agent's own state, by default one per device id."""
        return self.state_folder or default_state_folder(self.device_id)

    @property
    def health_file(self) -> Path:
        """The file that ``hsplit-agent health`` looks at."""
        return self.state / health.FILE_NAME


class AgentSettings(DeviceSettings):
    """Everything that the owner of a device decides; the run's terms come from the coordinator.

    ``data`` is a JSONL file. Its share ``evaluation_fraction`` is held out, unless
    ``evaluation_data`` is a file of its own. ``share_labels`` is the owner's consent to
    `labels: server`.
    """

    broker: BrokerSettings
    data: UserPath
    evaluation_data: UserPath | None = None
    evaluation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    share_labels: bool = False


def host_name() -> DeviceId:
    """Return this machine's name as a device id: what an id may not hold is replaced."""
    allowed = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())
    return DeviceId(allowed.lstrip("._-")[:64] or "device")


class ProfileSettings(DeviceSettings):
    """What ``hsplit-agent profile`` can be told.

    ``model`` is a folder or a hub name; None: only what sensors say, and the link. Measured are
    micro-batches of ``micro_batch`` sequences of ``length`` tokens under ``labels``, with the base
    in ``dtype``. An agent's
    own settings file serves as well: text is not looked at. ``graphs`` is a folder that
    ``hsplit-coordinator graphs`` wrote, for backend onnx.
    """

    device_id: Device = Field(default_factory=host_name)
    broker: BrokerSettings | None = None
    model: str | None = None
    graphs: UserPath | None = None
    labels: LabelMode = "device"
    dtype: ComputeDtype = "float32"
    micro_batch: Annotated[PositiveInt, Le(4096)] = 4
    length: Annotated[PositiveInt, Le(1_048_576)] = 128
    data: UserPath | None = None
    evaluation_data: UserPath | None = None
    evaluation_fraction: float = 0.1
    share_labels: bool = False
