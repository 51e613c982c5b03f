"""The seed of LoRA's dropout: named by what it is drawn for, so that nothing need be kept."""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias

Side: TypeAlias = Literal["device", "server"]


def dropout_seed(run_seed: int, *, device_id: str, step: int, micro_batch: int, side: Side) -> int:
    """Return the seed of one micro-batch's dropout on one side of the cut.

    The same arguments give the same masks, so a recomputation repeats them.
    """
    text = f"{run_seed}/{device_id}/{step}/{micro_batch}/{side}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
