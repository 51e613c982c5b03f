"""Measurements on disk: a device measures itself once for each kind of work, not at each start."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared.atomic import replace_file
from shared.errors import StorageError
from shared.protocol.profile import PROFILE_VERSION, Measurements

logger = logging.getLogger(__name__)

FOLDER = "profiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What measurements depend on: with another key they are other measurements.

    ``model``: `ModelArchitecture.fingerprint`; ``blocks``: how many blocks were measured with.
    ``length`` is `length_bucket`'s. ``accelerator``, ``power_mode`` and ``cpus`` are the machine
    as its sensors see it, the rest is what was asked for, and which programs measured.
    """

    device_id: str
    model: str
    blocks: int
    backend: str
    device: str
    accelerator: str | None
    power_mode: str | None
    cpus: float | None
    threads: int | None
    emulate: str | None
    dtype: str
    wire_dtype: str
    labels: str
    optimizer: str
    target_modules: tuple[str, ...]
    lora_dropout: bool
    micro_batch: int
    length: int
    hsplit_version: str
    backend_version: str
    profile_version: int = PROFILE_VERSION
    targets: int = 0
    """Classes of a classifier; 0: the head chooses between words."""
    int8_blocks: int = 0

    @property
    def file_name(self) -> str:
        """The name of this key's file."""
        return hashlib.sha256(_KEY.dump_json(self)).hexdigest()[:32] + ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    key: ProfileKey
    measurements: Measurements


_KEY: TypeAdapter[ProfileKey] = TypeAdapter(ProfileKey)
_STORED: TypeAdapter[_Stored] = TypeAdapter(_Stored)


def length_bucket(length: int) -> int:
    """Return the power of two from ``length`` on: what is measured holds for all below it."""
    return 1 << max(0, length - 1).bit_length()


class ProfileCache:
    """One JSON file per key. What is damaged or belongs to another key counts as missing."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, which is made when something is saved."""
        self._folder = folder

    def load(self, key: ProfileKey) -> Measurements | None:
        """Return what was measured under ``key``, without link and memory; None: nothing."""
        path = self._folder / key.file_name
        try:
            stored = _STORED.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            logger.warning("%s is not used, %s: measuring again", path, reason)
            return None
        if stored.key != key:
            logger.warning("%s is not used, it is of another device: measuring again", path)
            return None
        return stored.measurements

    def save(self, key: ProfileKey, measurements: Measurements) -> None:
        """Keep what was measured; where that fails, the next start measures again."""
        lasting = dataclasses.replace(measurements, memory_bytes=None, link=None)
        data = _STORED.dump_json(_Stored(key=key, measurements=lasting), indent=1)
        try:
            replace_file(self._folder / key.file_name, data, durable=False)
        except StorageError as error:
            logger.warning("%s; until then every start measures this device again", error)
