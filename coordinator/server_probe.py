"""The server's half of importance: what its weights do to the loss of probe micro-batches.

They go through the back as in training, without dropout, and teach it nothing: no adapter, no
gradient sum and no optimizer state is touched.

Shape suffixes: N packed tokens, M of them that the head reads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from coordinator.back_pass import (
    BackPass,
    GradientResult,
    HiddenResult,
    MicroBatchInput,
    MicroBatchKey,
    name_of,
)
from coordinator.importance import Measured, add
from shared.errors import ProtocolError
from shared.modeling.compute import explained_out_of_memory
from shared.modeling.importance import WatchedForward, watching
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame

_explained = explained_out_of_memory("the server")


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    """A probe micro-batch that waits for the head's gradient."""

    watched: WatchedForward
    hidden_MD: torch.Tensor
    target_tokens: int


class ServerProbe:
    """Measures the candidates ``modules`` of the back. Belongs to the trainer's owner's thread."""

    def __init__(self, through: BackPass, modules: tuple[str, ...]) -> None:
        """Start with nothing measured."""
        self._through = through
        self._modules = modules
        self._open: dict[tuple[DeviceId, MicroBatchKey], _Open] = {}
        self._measured: Mapping[str, Measured] = {}

    @property
    def open_micro_batches(self) -> int:
        """How many micro-batches wait for the head's gradient, holding their activations."""
        return len(self._open)

    @_explained
    def run(
        self,
        device_id: DeviceId,
        key: MicroBatchKey,
        sent: MicroBatchInput,
        *,
        target_tokens: int,
    ) -> HiddenResult | GradientResult:
        """Run one probe micro-batch, with ``target_tokens`` positions that predict a token.

        With `labels: device` it stays open until `take_gradient`.

        Raises:
            NumericsError: a shape, dtype, length or label that does not belong, or NaN or
                infinity, received or computed; nothing was measured.
            ProtocolError: the micro-batch is open already, labels are missing or unwanted, or
                the split layer's blocks are not held.
        """
        name = name_of(device_id, key, purpose="probe of ")
        if (device_id, key) in self._open:
            raise ProtocolError(f"{name} is open already")
        arrived = self._through.read(sent, name=name)
        back = self._through.back
        back.adapters.dropout.begin(None)
        with watching(back.skeleton, self._modules, source=arrived.hidden_ND) as watched:
            hidden_MD = self._through.run(arrived)
        waiting = _Open(watched, hidden_MD, target_tokens)
        if arrived.labels_M is None:
            frame = self._through.frame(hidden_MD, what=f"hidden states of {name}")
            self._open[device_id, key] = waiting
            return HiddenResult(frame)
        judged, loss_sum = self._through.judge(hidden_MD, arrived.labels_M, name=name)
        return GradientResult(self._backward(waiting, judged.loss, None, name=name), loss_sum)

    @_explained
    def take_gradient(
        self, device_id: DeviceId, key: MicroBatchKey, gradient: TensorFrame
    ) -> TensorFrame:
        """Take the head's gradient (M, D) of an open micro-batch; return that of what came in.

        Raises:
            NumericsError: wrong shape or dtype, NaN or infinity; nothing was measured. The
                micro-batch stays open where it was what came in.
            ProtocolError: no such micro-batch is open.
        """
        name = name_of(device_id, key, purpose="probe of ")
        waiting = self._open.get((device_id, key))
        if waiting is None:
            raise ProtocolError(f"{name} is not open: its activations never came or were dropped")
        outer_ND = self._through.head_gradient(gradient, waiting.hidden_MD, name=name)
        del self._open[device_id, key]
        return self._backward(waiting, waiting.hidden_MD, outer_ND, name=name)

    def drop(self, device_id: DeviceId) -> None:
        """Forget a device's open micro-batches; what its complete ones measured stays."""
        for open_key in [open_key for open_key in self._open if open_key[0] == device_id]:
            del self._open[open_key]

    def drop_open(self) -> None:
        """Forget all open micro-batches: the adapters they went through are changing."""
        self._open.clear()

    def take(self) -> Mapping[str, Measured]:
        """Return what was measured since the last time, by module, and start anew."""
        measured, self._measured = self._measured, {}
        return measured

    def _backward(
        self, waiting: _Open, output: torch.Tensor, outer: torch.Tensor | None, *, name: str
    ) -> TensorFrame:
        received, sums = waiting.watched.backward(output, outer, what=name)
        frame = self._through.frame(received, what=f"activation gradient of {name}")
        own = {module: Measured(value, waiting.target_tokens) for module, value in sums.items()}
        self._measured = add(self._measured, own)
        return frame
