"""Profiles in files: what ``hsplit-agent profile`` writes and ``hsplit-coordinator plan`` reads."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared.atomic import replace_file
from shared.errors import ConfigError
from shared.protocol.profile import PROFILE_VERSION, ProfileFile

MOST_BYTES = 2**20
"""A profile takes a few KiB; what is larger is none, and is not read."""
_PROFILE: TypeAdapter[ProfileFile] = TypeAdapter(ProfileFile)


def to_json(profile: ProfileFile) -> str:
    """Return a profile as JSON for people and programs; what is not known is left out."""
    return _PROFILE.dump_json(profile, indent=2, exclude_none=True).decode()


def write(path: Path, profile: ProfileFile) -> None:
    """Write a profile.

    Raises:
        StorageError: the file cannot be written.
    """
    replace_file(path, to_json(profile).encode() + b"\n")


def read(path: Path) -> ProfileFile:
    """Return the profile in a file.

    Raises:
        ConfigError: the file cannot be read, is no profile, holds measurements that none can
            be (zero, negative, NaN), or is of another version.
    """
    again = "measure again: hsplit-agent profile --model … --output FILE"
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"profile {path} is larger than any profile; {again}")
        _check_version(path, json.loads(data), again)
        return _PROFILE.validate_json(data)
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"profile {path}: {where}: {first['msg']}; {again}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"profile {path} is not JSON: {error}; {again}") from error


def _check_version(path: Path, value: object, again: str) -> None:
    measured = value.get("measurements") if isinstance(value, dict) else None
    version = measured.get("version", PROFILE_VERSION) if isinstance(measured, dict) else None
    if isinstance(version, int) and version != PROFILE_VERSION:
        raise ConfigError(
            f"profile {path} is of version {version}, this program reads {PROFILE_VERSION}; {again}"
        )
