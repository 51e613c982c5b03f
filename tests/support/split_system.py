"""A device's backend and the server's trainer in one process, joined by their frames alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from coordinator.server_training import (
    GradientResult,
    HiddenResult,
    LossResult,
    MicroBatchInput,
    MicroBatchKey,
    ServerTrainer,
)
from edge_agent.backends.base import Backend, MicroBatch, TokenBatch
from shared.adapters import HeldAdapters, LoraPair
from shared.class_counts import ClassCounts
from shared.classifier_weights import ClassifierTensors
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import TensorFrame, pack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.loaded_backends import BackendName, loaded
from tests.support.tiny_models import TinyModel, fresh_adapters


class SplitSystem:
    """Devices with their own split layers, and the server that holds the rest of each."""

    def __init__(
        self,
        model: TinyModel,
        split_layers: Mapping[str, int],
        folder: Path,
        *,
        training: TrainingTerms,
        lora: LoraTerms,
        optimizer: OptimizerTerms,
        backends: Mapping[str, BackendName] | None = None,
    ) -> None:
        """Build all sides; ``backends`` by device, torch where none is named."""
        self.training = training
        self.split_layers = split_layers
        self.blocks = model.architecture.block_count
        self.devices: dict[str, Backend] = {}
        for name, split_layer in split_layers.items():
            head = training.labels == "device"
            backend = loaded(
                (backends or {}).get(name, "torch"),
                model,
                folder,
                split_layer=split_layer,
                device_id=DeviceId(name),
                training=training,
                lora=lora,
                optimizer=optimizer,
            )
            backend.set_adapters(_fresh(model, lora, range(split_layer)), fold=False)
            if head and model.classifier:
                backend.set_classifier(model.classifier)
            self.devices[name] = backend
        first = min(split_layers.values())
        self.server: ServerTrainer | None = None
        if first < self.blocks or training.labels == "server":
            self.server = ServerTrainer(
                model.config,
                model.tensors,
                first_block=first,
                training=training,
                lora=lora,
                optimizer=optimizer,
                device="cpu",
            )
            self.server.set_adapters(_fresh(model, lora, range(first, self.blocks)), fold=False)
            if training.labels == "server":
                self.server.set_classifier(model.classifier)

    def alone(self, device: str) -> bool:
        return self.split_layers[device] == self.blocks and self.training.labels == "device"

    def forward(self, device: str, key: MicroBatch, batch: TokenBatch) -> MicroBatchInput:
        """Return what the device sends of a training micro-batch."""
        hidden = self.devices[device].forward(key, batch, train=True)
        labels = pack(batch.labels) if self.training.labels == "server" else None
        split_layer = self.split_layers[device]
        return MicroBatchInput(
            split_layer=split_layer, lengths=batch.lengths, hidden=hidden, labels=labels
        )

    def train_hidden(self, device: str, key: MicroBatch, batch: TokenBatch) -> TensorFrame:
        """Run a micro-batch up to the back's output and leave it open (labels: device)."""
        result = self._start(device, key, self.forward(device, key, batch))
        assert isinstance(result, HiddenResult)
        return result.hidden

    def train_back(self, device: str, key: MicroBatch, gradient: TensorFrame) -> None:
        """Carry the head's gradient back through both sides."""
        assert self.server is not None
        server_key = MicroBatchKey(key.step, key.index)
        answer = self.server.train_gradient(DeviceId(device), server_key, gradient)
        self.devices[device].backward(key, answer)

    def finish(self, device: str, key: MicroBatch, sent: MicroBatchInput) -> float:
        """Carry a sent training micro-batch to its end; return its summed loss."""
        result = self._start(device, key, sent)
        if isinstance(result, GradientResult):
            self.devices[device].backward(key, result.gradient)
            return result.loss_sum
        loss, gradient = self.devices[device].head(key, result.hidden, train=True)
        assert gradient is not None
        self.train_back(device, key, gradient)
        return loss

    def train(self, device: str, key: MicroBatch, batch: TokenBatch) -> float:
        """Run one training micro-batch from end to end; return its summed loss."""
        if self.alone(device):
            return self.devices[device].whole(key, batch, train=True)
        return self.finish(device, key, self.forward(device, key, batch))

    def close(self, step: int, target_tokens: Mapping[str, int]) -> None:
        """Take optimizer step ``step`` on the devices and on the server."""
        for device, tokens in target_tokens.items():
            self.devices[device].step(step, target_tokens=tokens)
        if self.server is not None:
            names = [DeviceId(device) for device in target_tokens]
            total = sum(target_tokens.values())
            self.server.close_step(step, devices=names, target_tokens=total)

    def step(self, step: int, batches: Mapping[str, Sequence[TokenBatch]]) -> float:
        """Run one whole step, device after device; return its summed loss."""
        loss = 0.0
        for device, micro_batches in batches.items():
            for index, batch in enumerate(micro_batches):
                loss += self.train(device, MicroBatch(step, index), batch)
        self.close(step, {device: tokens_of(own) for device, own in batches.items()})
        return loss

    def evaluate(self, device: str, batch: TokenBatch) -> float:
        """Return the summed loss of one evaluation micro-batch."""
        return self.evaluate_with_counts(device, batch)[0]

    def evaluate_with_counts(self, device: str, batch: TokenBatch) -> tuple[float, ClassCounts]:
        """Return the summed loss of one evaluation micro-batch, and how a classifier chose."""
        loss, counts = self._evaluate(device, batch)
        return loss, counts or self.devices[device].take_counts()

    def _evaluate(self, device: str, batch: TokenBatch) -> tuple[float, ClassCounts]:
        backend, key = self.devices[device], MicroBatch(0, 0)
        if self.alone(device):
            return backend.whole(key, batch, train=False), ()
        assert self.server is not None
        hidden = backend.forward(key, batch, train=False)
        labels = pack(batch.labels) if self.training.labels == "server" else None
        sent = MicroBatchInput(
            split_layer=self.split_layers[device],
            lengths=batch.lengths,
            hidden=hidden,
            labels=labels,
        )
        result = self.server.evaluate(DeviceId(device), sent)
        if isinstance(result, LossResult):
            return result.loss_sum, result.counts
        assert isinstance(result, HiddenResult)
        return backend.head(key, result.hidden, train=False)[0], ()

    def _start(
        self, device: str, key: MicroBatch, sent: MicroBatchInput
    ) -> HiddenResult | GradientResult:
        assert self.server is not None
        return self.server.train(DeviceId(device), MicroBatchKey(key.step, key.index), sent)

    def adapters(self) -> dict[tuple[str, str], LoraPair]:
        """Return every pair, by holder (``server`` or the device) and module."""
        holders: dict[str, Mapping[str, LoraPair]] = {
            name: backend.adapters() for name, backend in self.devices.items()
        }
        if self.server is not None:
            holders["server"] = self.server.adapters()
        return {(name, m): pair for name, held in holders.items() for m, pair in held.items()}

    def classifiers(self) -> dict[str, ClassifierTensors]:
        """Return the classifier of every holder that has one."""
        held = {name: backend.classifier() for name, backend in self.devices.items()}
        if self.server is not None:
            held["server"] = self.server.classifier()
        return {name: weights for name, weights in held.items() if weights}


def tokens_of(batches: Iterable[TokenBatch]) -> int:
    """Return the target tokens of several micro-batches together."""
    return sum(batch.target_tokens for batch in batches)


def _fresh(model: TinyModel, lora: LoraTerms, blocks: range) -> HeldAdapters:
    return fresh_adapters(model.architecture, lora, blocks=blocks)
