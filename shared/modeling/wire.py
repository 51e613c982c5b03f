"""torch tensors ↔ frames on the wire, checked.

Shape suffixes: N packed tokens, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch

from shared.protocol.tensors import (
    TensorFrame,
    expect,
    not_finite_received,
    not_finite_to_send,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
}
"""Wire and compute dtypes by their name in `shared.terms`."""


def to_frame(tensor: torch.Tensor, *, dtype: str, what: str) -> TensorFrame:
    """Return a float tensor as a frame of ``dtype``; ``what`` names it in an error.

    Raises:
        NumericsError: it holds NaN or infinity, perhaps only after the cast to ``dtype``.
    """
    cast = tensor.detach().to(DTYPES[dtype])
    if not _is_finite(cast):
        raise not_finite_to_send(what, dtype)
    flat = cast.cpu().contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return TensorFrame(dtype, tuple(tensor.shape), data)


def from_frame(
    frame: TensorFrame, *, what: str, dtype: str, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a frame as a tensor of its own dtype; ``what`` names it in an error.

    The tensor may share memory with a writable ``frame.data``: do not write into it.

    Raises:
        NumericsError: another dtype or shape than expected, or NaN or infinity.
    """
    expect(frame, what, dtype=dtype, shape=shape)
    if frame.nbytes == 0:
        return torch.zeros(shape, dtype=DTYPES[dtype], device=device)
    raw = np.frombuffer(frame.data, dtype=np.uint8)
    # torch has no read-only tensors, and a slice of a larger buffer may start anywhere.
    usable = raw.flags.writeable and raw.ctypes.data % DTYPES[dtype].itemsize == 0
    tensor = torch.from_numpy(raw if usable else raw.copy()).view(DTYPES[dtype]).view(shape)
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise not_finite_received(what)
    return tensor.to(device)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Say whether all entries are: its extremes tell, in a 20th of the time of torch.isfinite."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
