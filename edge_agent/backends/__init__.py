"""Backends: what computes on the device. Each is imported only when it is opened."""

from __future__ import annotations

from edge_agent.backends.base import Backend
from shared.errors import ConfigError

BACKENDS = ("torch",)


def open_backend(name: str, *, device: str | None = None, threads: int | None = None) -> Backend:
    """Return a new backend by name; ``threads``: CPU threads that it may use.

    ``device``: ``cpu``, ``cuda`` or ``cuda:1``; None: the GPU where there is one.

    Raises:
        ConfigError: no such backend, what it needs is not installed, or no such device.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} does not exist; choose one of: {', '.join(BACKENDS)}")
    try:
        # Inside the function: torch alone takes seconds to import and 220 MiB.
        from edge_agent.backends.torch_backend import TorchBackend  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backend {name!r} needs {error.name}, which is not installed: "
            f"pip install 'hsplit[{name}]'"
        ) from error
    return TorchBackend(device, threads=threads)
