"""onnxruntime on one execution provider: opening graphs, running them, values where they stay.

Values are `OrtValue`s on the provider's own device, so what a forward pass keeps for the backward
pass never leaves a GPU. On the CPU they share memory with the arrays that they were made of.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from shared.errors import ConfigError, HsplitError, MemoryFullError, ModelError
from shared.memory_use import LOWER_IN_A_RUN

logger = logging.getLogger(__name__)

Value: TypeAlias = Any
"""An `onnxruntime.OrtValue`."""
Values: TypeAlias = Mapping[str, Value]

CPU = "CPUExecutionProvider"
PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider", "cpu": CPU}
"""By the word that a setting names them with.

TensorRT is never chosen unasked: it builds an engine anew, for seconds to minutes, whenever a
batch, length or rank comes that is beyond those that it has met.
"""

_IN_ORDER = ("tensorrt", "cuda", "cpu")
"""What one provider has no kernel for, the next computes; their values are on one GPU."""

_TRIAL = (
    b'\x08\n:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14"
)
"""A graph as a file would hold it (IR 10, opset 20): one number x in, y = Identity(x) out."""

_OUT_OF_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "out of memory")
"""In the words of onnxruntime's errors where a memory is full."""


class Engine:
    """Opens graphs on one provider. Not thread-safe."""

    def __init__(self, device: str | None = None, *, threads: int | None = None) -> None:
        """Compute on ``device``: ``cpu``, ``cuda``, ``cuda:1``, ``tensorrt``.

        None: CUDA where onnxruntime has it and it loads, else the CPU. ``threads``: CPU threads;
        None: as many as onnxruntime takes.

        Raises:
            ConfigError: this onnxruntime has no such provider.
        """
        kind, _, index = (device or "").partition(":")
        self.index = int(index or 0)
        self._asked = kind or None
        self._threads = threads
        self._kind = _choose(self._asked)
        _share_memory()

    def __str__(self) -> str:
        """Say what computes: library, version, provider, and which GPU."""
        gpu = f" {self.index}" if self.is_gpu else ""
        return f"onnxruntime {ort.__version__}, {self.provider}{gpu}"

    @property
    def provider(self) -> str:
        """The execution provider that graphs run on."""
        return PROVIDERS[self._kind]

    @property
    def is_gpu(self) -> bool:
        """Whether values lie on a GPU."""
        return self._kind != "cpu"

    def load_provider(self) -> None:
        """Load the provider now, so that what computes is known before the first graph comes.

        Falls back to the CPU, with a warning, where it was not asked for by name.

        Raises:
            ConfigError: it was asked for by name and does not load.
        """
        try:
            self.open("a trial", _TRIAL).run({"x": self.put(np.zeros(1, np.float32))})
        except Exception as error:  # as in `_session`
            is_other = isinstance(error, HsplitError) and not isinstance(error, ConfigError)
            if is_other or not self.is_gpu:
                raise
            cause = error.__cause__ if isinstance(error, ConfigError) else error
            if self._asked is not None:
                raise self._unusable(cause) from error
            why = _in_brackets(cause)
            logger.warning("%s does not load%s: computing on the CPU instead", self.provider, why)
            self._kind = "cpu"

    def open(self, name: str, path: Path | bytes) -> Graph:
        """Open the graph in a file, or what one holds.

        Raises:
            ModelError: this onnxruntime cannot read it.
            ConfigError: the provider does not load; see `load_provider`.
        """
        session = self._session(name, path)
        if self.provider not in session.get_providers():
            raise self._unusable(None)
        return Graph(name, session, device=self._place)

    def put(self, array: npt.NDArray[Any]) -> Value:
        """Return an array as a value on the device; on the CPU it shares the array's memory.

        Raises:
            MemoryFullError: the device's memory is full.
        """
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        with explained_out_of_memory():
            return ort.OrtValue.ortvalue_from_numpy(contiguous, *self._place)

    @property
    def _place(self) -> tuple[str, int]:
        return ("cuda", self.index) if self.is_gpu else ("cpu", 0)

    def _session(self, name: str, path: Path | bytes) -> ort.InferenceSession:
        graph = path if isinstance(path, bytes) else str(path)
        try:
            return ort.InferenceSession(graph, self._options(), providers=self._providers())
        except Exception as error:  # onnxruntime's own are many, and derive from Exception alone
            if self.is_gpu and not _is_of_the_graph(error):
                raise self._unusable(error) from error
            raise ModelError(
                f"{name}: onnxruntime {ort.__version__} cannot open this graph "
                f"({_first_line(error)}); if it is older than the coordinator's, upgrade it: "
                "pip install --upgrade onnxruntime"
            ) from error

    def _unusable(self, cause: BaseException | None) -> ConfigError:
        return ConfigError(
            f"onnxruntime {ort.__version__} cannot compute on device "
            f"{self._asked or self._kind}: its {self.provider} does not load"
            f"{_in_brackets(cause)}; check the driver and the libraries that it needs, or "
            "choose device: cpu"
        )

    def _providers(self) -> list[Any]:
        kinds = _IN_ORDER[_IN_ORDER.index(self._kind) :]
        return [
            (PROVIDERS[kind], {} if kind == "cpu" else {"device_id": self.index}) for kind in kinds
        ]

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Threads that spin while the agent waits for the coordinator take others' time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # One arena for all graphs, see `_share_memory`. A plan of memory for each shape that ever
        # came would take the place of the next: it fits no batch but its own.
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        # Falling back is told once, by us.
        options.log_severity_level = 4
        return options


class Graph:
    """One opened graph."""

    def __init__(
        self, name: str, session: ort.InferenceSession, *, device: tuple[str, int]
    ) -> None:
        """Take the session; results stay on ``device``."""
        self.name = name
        self._session = session
        self._device = device
        self.inputs: Mapping[str, tuple[int | str | None, ...]] = {
            one.name: tuple(one.shape) for one in session.get_inputs()
        }
        self.outputs = tuple(one.name for one in session.get_outputs())

    def run(self, values: Values, *, wanted: Collection[str] | None = None) -> dict[str, Value]:
        """Return the outputs (all, or those ``wanted``); more ``values`` than inputs may be given.

        Raises:
            MemoryFullError: the memory is full.
        """
        names = self.outputs if wanted is None else tuple(wanted)
        binding = self._session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in names:
            binding.bind_output(name, *self._device)
        with explained_out_of_memory():
            self._session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))


@contextlib.contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Say what to lower where the memory is full; also a decorator.

    Raises:
        MemoryFullError: numpy or onnxruntime ran out of memory inside.
    """
    try:
        yield
    except MemoryFullError:  # an engine's own, which has said so
        raise
    except MemoryError as error:
        raise _memory_full(error) from error
    except Exception as error:
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        raise _memory_full(error) from error


def _memory_full(error: BaseException) -> MemoryFullError:
    return MemoryFullError(
        f"this device is out of memory: lower {LOWER_IN_A_RUN} ({_first_line(error)})"
    )


@functools.cache
def _share_memory() -> None:
    """Let all graphs of this process take memory from one place.

    They run one after the other, so what one no longer needs serves the next. By default each
    keeps the most that it ever needed.
    """
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


def _choose(asked: str | None) -> str:
    """Return the kind of device to compute on.

    Raises:
        ConfigError: this onnxruntime has no provider for what was asked for.
    """
    offered = ort.get_available_providers()
    if asked is None:
        return "cuda" if PROVIDERS["cuda"] in offered else "cpu"
    if asked not in PROVIDERS or PROVIDERS[asked] not in offered:
        there = [kind for kind, provider in PROVIDERS.items() if provider in offered]
        raise ConfigError(
            f"device {asked} is not there: onnxruntime {ort.__version__} on this machine offers "
            f"{', '.join(there)}; a GPU needs a build for it, such as onnxruntime-gpu"
        )
    return asked


def _is_of_the_graph(error: Exception) -> bool:
    return type(error).__name__ in (
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
    )


def _in_brackets(cause: BaseException | None) -> str:
    return "" if cause is None else f" ({_first_line(cause)})"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
