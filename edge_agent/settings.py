"""What an agent can be told: `AgentSettings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from shared import health
from shared.config import (
    BrokerSettings,
    HsplitSettings,
    MemoryLimit,
    UserPath,
    base_folder,
)
from shared.protocol.messages import Device


def _cache_folder() -> Path:
    return base_folder("XDG_CACHE_HOME", "~/.cache") / "hsplit"


def _state_root() -> Path:
    return base_folder("XDG_STATE_HOME", "~/.local/state") / "hsplit"


class AgentSettings(HsplitSettings):
    """Everything that the owner of a device decides; the run's terms come from the coordinator.

    ``data`` is a JSONL file. Its share ``evaluation_fraction`` is held out, unless
    ``evaluation_data`` is a file of its own. ``cache_folder`` keeps the base weights and may
    be shared by agents; ``state_folder`` belongs to one agent alone. ``memory_limit`` is what
    training may use; ``threads`` the CPU threads (None: the backend's choice).
    """

    broker: BrokerSettings
    device_id: Device
    data: UserPath
    evaluation_data: UserPath | None = None
    evaluation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    cache_folder: UserPath = Field(default_factory=_cache_folder)
    state_folder: UserPath | None = None
    backend: Literal["torch"] = "torch"
    memory_limit: MemoryLimit | None = None
    threads: Annotated[int, Ge(1), Le(1024)] | None = None

    @property
    def state(self) -> Path:
        """The folder of this agent's own state, by default one per device id."""
        return self.state_folder or _state_root() / self.device_id

    @property
    def health_file(self) -> Path:
        """The file that ``hsplit-agent health`` looks at."""
        return self.state / health.FILE_NAME
