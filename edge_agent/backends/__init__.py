"""Backends: what computes on the device. Each is imported only when it is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from edge_agent.backends.base import Backend
from shared.errors import ConfigError

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers"),
    "onnx": ("onnxruntime",),
}
"""Each backend and what it imports, the package that computes first; those we prefer first."""


def chosen_backend(name: str) -> str:
    """Return the name of a backend; ``auto`` is the first whose packages are installed.

    Nothing is imported.

    Raises:
        ConfigError: no such backend, or ``auto`` and none is installed.
    """
    if name in PACKAGES:
        return name
    if name != "auto":
        known = ", ".join(("auto", *PACKAGES))
        raise ConfigError(f"backend {name!r} does not exist; choose one of: {known}")
    for backend, packages in PACKAGES.items():
        if all(importlib.util.find_spec(package) is not None for package in packages):
            return backend
    raise ConfigError(
        "nothing is installed that could compute on this device: pip install 'hsplit[onnx]', or "
        "'hsplit[torch]'"
    )


def open_backend(name: str, *, device: str | None = None, threads: int | None = None) -> Backend:
    """Return a new backend by name; ``threads``: CPU threads that it may use.

    ``device``: ``cpu``, ``cuda`` or ``cuda:1``, for onnx also ``tensorrt`` or ``tensorrt:1``;
    None: the GPU where there is one.

    Raises:
        ConfigError: no such backend, what it needs is not installed, or no such device.
    """
    chosen = chosen_backend(name)
    if chosen == "torch" and (device or "").startswith("tensorrt"):
        raise ConfigError(
            f"device {device} is for onnxruntime, but what computes here is torch: choose "
            "backend: onnx, or device: cuda"
        )
    try:
        return _opened(chosen, device, threads=threads)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backend {chosen!r} needs {error.name}, which is not installed: "
            f"pip install 'hsplit[{chosen}]'"
        ) from error


def _opened(name: str, device: str | None, *, threads: int | None) -> Backend:
    # Inside the function: torch alone takes seconds to import and 220 MiB.
    if name == "onnx":
        from edge_agent.backends.onnx_backend import OnnxBackend  # noqa: PLC0415

        return OnnxBackend(device, threads=threads)
    from edge_agent.backends.torch_backend import TorchBackend  # noqa: PLC0415

    return TorchBackend(device, threads=threads)
