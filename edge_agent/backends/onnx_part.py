"""All of a device's part that was built from one assignment, for the onnx backend."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.backends.base import FrontBase
from edge_agent.backends.frozen_weights import FrozenWeights
from edge_agent.backends.numpy_optimizer import NumpyOptimizer
from edge_agent.backends.onnx_engine import Engine
from edge_agent.backends.onnx_front import OnnxFront
from edge_agent.backends.onnx_head import OnnxHead
from shared.architecture import ModelArchitecture
from shared.dropout_seed import dropout_seed
from shared.protocol.messages import DeviceId
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms


@dataclass(frozen=True, slots=True, eq=False)
class OnnxPart:
    """Front, head (where it is here) and optimizer, under a run's terms."""

    architecture: ModelArchitecture
    training: TrainingTerms
    device_id: DeviceId
    freeze_a: bool
    front: OnnxFront
    head: OnnxHead | None
    optimizer: NumpyOptimizer

    @classmethod
    def build(
        cls,
        engine: Engine,
        base: FrontBase,
        *,
        device_id: DeviceId,
        training: TrainingTerms,
        lora: LoraTerms,
        optimizer: OptimizerTerms,
    ) -> OnnxPart:
        """Build the part from pristine base weights, without adapters.

        Raises:
            ModelError: a file lacks a tensor, a graph is missing or cannot be opened, or the
                architecture is not supported.
            PlanError: the split layer does not exist, or max_length exceeds the positions.
        """
        architecture = ModelArchitecture.from_json(base.config_json, training)
        architecture.check_split_layer(base.split_layer)
        architecture.check_max_length(training.max_length)
        weights = FrozenWeights(base.files.values(), dtype=training.dtype)
        front = OnnxFront(
            engine,
            base.graphs,
            weights,
            architecture=architecture,
            config_json=base.config_json,
            split_layer=base.split_layer,
            lora_dropout=lora.lora_dropout,
            int8_blocks=training.int8_blocks,
        )
        head = None
        if training.labels == "device":
            head = OnnxHead(engine, base.graphs, weights, architecture=architecture)
        part = cls(
            architecture=architecture,
            training=training,
            device_id=device_id,
            freeze_a=lora.freeze_a,
            front=front,
            head=head,
            optimizer=NumpyOptimizer(optimizer, total_steps=training.total_steps),
        )
        part.follow()
        return part

    def follow(self) -> None:
        """Let the optimizer follow what is trained now; what is new starts fresh."""
        head = {} if self.head is None else self.head.trained()
        self.optimizer.follow({**self.front.trained(freeze_a=self.freeze_a), **head})

    def step(self, step: int, *, target_tokens: int) -> float:
        """Take one optimizer step; see `Backend.step`."""
        norm = self.optimizer.step(step, denominator=target_tokens)
        self.front.refresh()
        if self.head is not None:
            self.head.refresh()
        return norm

    def seed(self, step: int, micro_batch: int) -> int:
        """Return the seed of a micro-batch's dropout on this side."""
        return dropout_seed(
            self.training.seed,
            device_id=self.device_id,
            step=step,
            micro_batch=micro_batch,
            side="device",
        )
