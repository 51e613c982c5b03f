"""What ``hsplit-coordinator demo`` needs and no network has to bring: a small base and data."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

DEVICES = ("workstation", "laptop", "nano")
"""Three unequal owners of text, the largest first."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One demo device's own text: JSON lines of ``prompt`` and ``completion``."""

    device: str
    training: Path
    held_out: Path


def base_folder() -> Path:
    """Return the folder of the small GPT-2 base, in Hugging Face form."""
    return _folder() / "tiny-gpt2"


def shards() -> tuple[Shard, ...]:
    """Return the E2E sample of each device: disjoint, of 1200, 1000 and 800 lines."""
    folder = _folder() / "e2e"
    return tuple(
        Shard(device, folder / f"{device}.jsonl", folder / f"{device}-held-out.jsonl")
        for device in DEVICES
    )


def _folder() -> Path:
    # Installed wheels are unpacked, so package data are files with paths of their own.
    return Path(str(resources.files(__name__)))
