"""NVIDIA's library (NVML) behind `pynvml`: foreign code that may be absent, broken, or hang.

Everything here that asks the library runs in a thread of its own (`bounded`), which is left
behind where an answer does not come: a driver whose GPU fell off its bus waits for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

ANSWER_WITHIN_S = 5.0
"""nvmlInit takes up to two seconds on a machine whose GPU was asleep."""


@dataclass(frozen=True, slots=True)
class OpenedGpu:
    """``library``: pynvml, initialised; ``handle``: its handle of one GPU."""

    library: Any
    handle: Any

    def close(self) -> None:
        """Let go of the driver, whatever it says to that."""
        with contextlib.suppress(Exception):  # foreign code; and nothing is left to be done
            self.library.nvmlShutdown()


@dataclass(frozen=True, slots=True)
class NoGpu:
    """``why`` there is none to be read; None: this machine has none, as most."""

    why: str | None


class Questions:
    """One round of questions to one GPU, and what was wrong with the answers. One thread."""

    def __init__(self, gpu: OpenedGpu) -> None:
        """Ask ``gpu``."""
        self._library = gpu.library
        self.unsupported: set[str] = set()
        """What a healthy driver says that this GPU does not have."""
        self.odd: dict[str, str] = {}
        """What should have been answered but was not, and why."""

    def ask(self, what: str, *calls: Callable[[], T]) -> T | None:
        """Return what the first of ``calls`` that this driver knows answers; None: nothing."""
        why: Exception | None = None
        for call in calls:
            try:
                return call()
            except Exception as error:  # noqa: BLE001 - foreign code: it may raise anything
                why = error
                if not _is_missing(error):
                    break
        name = error_name(self._library, why)
        if name == "NOT_SUPPORTED":
            self.unsupported.add(what)
        elif name != "NO_PERMISSION":
            self.odd[what] = words(why)
        return None


def bounded(call: Callable[[], T]) -> T | None:
    """Return what ``call`` returns (it must not raise), or None where that takes too long."""
    answers: queue.SimpleQueue[T] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(call()), name="nvml", daemon=True).start()
    try:
        return answers.get(timeout=ANSWER_WITHIN_S)
    except queue.Empty:
        return None


def open_gpu(which: int | str) -> OpenedGpu | NoGpu:
    """Return the GPU of this number or UUID. Raises nothing."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return NoGpu(None)
    try:
        library.nvmlInit()
    except Exception as error:  # noqa: BLE001 - foreign code: it may raise anything
        absent = error_name(library, error) in ("LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED")
        return NoGpu(None if absent else f"nvmlInit: {words(error)}")
    try:
        return OpenedGpu(library, _handle(library, which))
    except Exception as error:  # noqa: BLE001 - foreign code: it may raise anything
        found = _count(library)
        OpenedGpu(library, None).close()
        return NoGpu(f"GPU {which} of {found}: {words(error)}" if found else None)


def error_name(library: Any, error: Exception | None) -> str | None:
    """Return what NVML calls this error, such as ``NOT_SUPPORTED``; None: it is none of its own."""
    value = getattr(error, "value", None)
    prefix = "NVML_ERROR_"
    for name, code in vars(library).items():
        if name.startswith(prefix) and code == value:
            return str(name.removeprefix(prefix))
    return None


def words(error: Exception | None) -> str:
    """Return the error in words; NVML's own come from the library, so they may be garbage."""
    try:
        return str(error) or type(error).__name__
    except Exception:  # noqa: BLE001 - foreign code: it may raise anything
        return type(error).__name__


def _handle(library: Any, which: int | str) -> Any:
    if isinstance(which, str):
        return library.nvmlDeviceGetHandleByUUID(which)
    return library.nvmlDeviceGetHandleByIndex(which)


def _count(library: Any) -> int:
    try:
        return int(library.nvmlDeviceGetCount())
    except Exception:  # noqa: BLE001 - foreign code: it may raise anything
        return 0


def _is_missing(error: Exception) -> bool:
    """Say whether pynvml or the driver is too old, or too new, to have what was called."""
    return isinstance(error, AttributeError) or type(error).__name__ in (
        "NVMLError_FunctionNotFound",
        "NVMLLibraryMismatchError",
        "NVMLError_ArgumentVersionMismatch",
    )
