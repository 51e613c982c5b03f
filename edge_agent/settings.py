"""What an agent can be told: `AgentSettings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from shared import health
from shared.config import (
    BrokerSettings,
    ComputeDevice,
    HsplitSettings,
    MemoryLimit,
    UserPath,
    base_folder,
)
from shared.protocol.messages import Device


def _cache_folder() -> Path:
    return base_folder("XDG_CACHE_HOME", "~/.cache") / "hsplit"


def default_state_folder(device_id: str) -> Path:
    """Return the folder of a device's own state, where its settings name none."""
    return base_folder("XDG_STATE_HOME", "~/.local/state") / "hsplit" / device_id


class AgentSettings(HsplitSettings):
    """Everything that the owner of a device decides; the run's terms come from the coordinator.

    ``data`` is a JSONL file. Its share ``evaluation_fraction`` is held out, unless
    ``evaluation_data`` is a file of its own. ``cache_folder`` keeps the base weights and may
    be shared by agents, and shrinks to ``cache_limit`` where one is given; ``state_folder``
    belongs to one agent alone. ``memory_limit`` is what training may use; ``device`` where it
    computes (auto: on the GPU where there is one); ``threads`` the CPU threads (None: the
    backend's choice). ``share_labels`` is the owner's consent to `labels: server`.
    """

    broker: BrokerSettings
    device_id: Device
    data: UserPath
    evaluation_data: UserPath | None = None
    evaluation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    share_labels: bool = False
    cache_folder: UserPath = Field(default_factory=_cache_folder)
    cache_limit: MemoryLimit | None = None
    state_folder: UserPath | None = None
    backend: Literal["torch"] = "torch"
    device: ComputeDevice = "auto"
    memory_limit: MemoryLimit | None = None
    threads: Annotated[int, Ge(1), Le(1024)] | None = None

    @property
    def state(self) -> Path:
        """The folder of this agent's own state, by default one per device id."""
        return self.state_folder or default_state_folder(self.device_id)

    @property
    def health_file(self) -> Path:
        """The file that ``hsplit-agent health`` looks at."""
        return self.state / health.FILE_NAME
