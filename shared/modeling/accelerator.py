"""What torch takes of an accelerator's memory."""

from __future__ import annotations

import logging

import torch

from shared.memory_use import (
    LEAST_CONTEXT_BYTES,
    TYPICAL_CONTEXT_BYTES,
    AcceleratorMemory,
)

logger = logging.getLogger(__name__)

_WARM_UP = 64


class TorchMemory:
    """A `shared.memory_use.MeasuresAccelerator` for one torch device."""

    def __init__(self, device: torch.device) -> None:
        """Measure ``device``, the CPU or a CUDA device."""
        self._device = device
        self._context_bytes: int | None = None

    def restart_memory_peak(self) -> None:
        """Finish what is under way, give back what is unused, and count the peak from here."""
        if self._device.type != "cuda":
            return
        if self._context_bytes is None:
            self._context_bytes = _context_bytes(self._device)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def accelerator_memory(self) -> AcceleratorMemory | None:
        """Return what is used of the accelerator's memory; None on the CPU."""
        if self._device.type != "cuda":
            return None
        if self._context_bytes is None:
            self._context_bytes = _context_bytes(self._device)
        # Reserved, not allocated: what torch keeps for itself nobody else can have.
        return AcceleratorMemory(
            used_bytes=torch.cuda.memory_reserved(self._device),
            peak_bytes=torch.cuda.max_memory_reserved(self._device),
            runtime_bytes=self._context_bytes,
            is_own=not torch.cuda.get_device_properties(self._device).is_integrated,
        )


def wait_for(device: torch.device) -> None:
    """Return when everything that was asked of ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _context_bytes(device: torch.device) -> int:
    """Make the context, with its libraries, and return what it takes beside torch's own memory.

    Seen from outside, by NVML, as the difference: so only the first use of the device in a
    process tells it, and only while no other process takes or gives back memory there.
    """
    before = _used_bytes(device)
    square = torch.ones(_WARM_UP, _WARM_UP, device=device)
    (square @ square).sum().item()
    del square
    torch.cuda.empty_cache()
    after = _used_bytes(device)
    if before is None or after is None:
        return TYPICAL_CONTEXT_BYTES
    found = after - before - torch.cuda.memory_reserved(device)
    return found if found >= LEAST_CONTEXT_BYTES else TYPICAL_CONTEXT_BYTES


def _used_bytes(device: torch.device) -> int | None:
    """Return what all processes use of a device's memory, by NVML; None where it does not tell."""
    try:
        # By number: asked for a device without one, torch makes its context to find it out.
        return int(torch.cuda.device_memory_used(device.index or 0))
    except Exception as error:  # noqa: BLE001 - pynvml's own errors, and pynvml may be missing
        logger.debug("NVML does not tell what is used of %s: %s", device, error)
        return None
