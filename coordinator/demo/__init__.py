"""What ``hsplit-coordinator demo`` needs and no network has to bring: a small base and data."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

DEVICES = {
    "workstation": "speed=0.5,uplink=200Mbit/s,downlink=200Mbit/s,latency=2ms",
    "laptop": "speed=0.25,uplink=100Mbit/s,downlink=100Mbit/s,latency=5ms",
    "nano": "speed=0.1,uplink=50Mbit/s,downlink=50Mbit/s,latency=10ms",
}
"""Three unequal owners of text, and what they play: all share this machine's processors."""

WITHOUT_TORCH = "nano"
"""The device that computes with onnxruntime; the others do with torch."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One demo device and its own text: JSON lines of ``prompt`` and ``completion``.

    ``emulate``: the device that its agent plays (``hsplit-agent run --emulate``). ``backend``:
    what it computes with.
    """

    device: str
    training: Path
    held_out: Path
    emulate: str
    backend: str


def base_folder() -> Path:
    """Return the folder of the small GPT-2 base, in Hugging Face form."""
    return _folder() / "tiny-gpt2"


def shards() -> tuple[Shard, ...]:
    """Return the E2E sample of each device: disjoint, of 1200, 1000 and 800 lines."""
    folder = _folder() / "e2e"
    return tuple(
        Shard(
            device,
            folder / f"{device}.jsonl",
            folder / f"{device}-held-out.jsonl",
            emulate,
            "onnx" if device == WITHOUT_TORCH else "torch",
        )
        for device, emulate in DEVICES.items()
    )


def _folder() -> Path:
    # Installed wheels are unpacked, so package data are files with paths of their own.
    return Path(str(resources.files(__name__)))
