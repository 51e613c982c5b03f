"""Where torch computes, and what it means when its memory is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from shared.errors import ConfigError, MemoryFullError
from shared.memory_use import LOWER_IN_A_RUN

_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""In the words of the plain `RuntimeError` that torch raises where the CPU's memory is full."""


def compute_device(wanted: str | None) -> torch.device:
    """Return the torch device named ``wanted``; None: CUDA where available, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(wanted or ("cuda" if found else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(
            f"device {wanted} is not there: torch {torch.__version__} sees {found} CUDA devices "
            "on this machine; check `nvidia-smi` and that this torch is built for CUDA, or "
            "choose device: cpu"
        )
    return device


@contextlib.contextmanager
def explained_out_of_memory(owner: str, *, lower: str = LOWER_IN_A_RUN) -> Iterator[None]:
    """Say what to ``lower`` where the memory of ``owner`` is full; also a decorator.

    Raises:
        MemoryFullError: torch ran out of memory inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_ALLOCATOR not in str(error):
            raise
        raise MemoryFullError(
            f"{owner} is out of memory: lower {lower} ({str(error).splitlines()[0][:200]})"
        ) from error
