"""The head of a model in graphs: the loss of rows, and the gradient of its sum.

Shape suffixes: M rows with a target, C of them in one chunk, D hidden size, V vocabulary,
K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_agent.backends.frozen_weights import Array32, FrozenWeights
from edge_agent.backends.onnx_engine import Engine, Value
from shared.architecture import ModelArchitecture
from shared.class_counts import ClassCounts, counted, total
from shared.classifier_weights import ClassifierTensors, check_classifier
from shared.errors import ModelError, ProtocolError
from shared.graphs import HEAD, LOSS

CHUNK_LOGITS = 1 << 23
"""Logits held at once, three times: 32 MiB in float32 each. Smaller chunks read W more often."""

_WEIGHT = "weight."


@dataclass(frozen=True, slots=True, eq=False)
class JudgedRows:
    """The summed loss; with gradients that of the rows (M, D) and of a classifier's weights."""

    loss_sum: float
    gradient_MD: Array32 | None = None
    classifier_gradients: Mapping[str, Array32] = field(default_factory=dict)
    counts: ClassCounts = ()


class OnnxHead:
    """Final norm and output projection, or pooler and classifier. Not thread-safe."""

    def __init__(
        self,
        engine: Engine,
        graphs: Mapping[str, Path],
        weights: FrozenWeights,
        *,
        architecture: ModelArchitecture,
    ) -> None:
        """Open the graphs and put the weights where they are used; a classifier is zero.

        Raises:
            ModelError: a graph or a tensor is missing, or they do not belong together.
        """
        missing = [name for name in (HEAD, LOSS) if name not in graphs]
        if missing:
            raise ModelError(f"the coordinator gave no {missing[0]}, which labels: device needs")
        self._engine = engine
        self._architecture = architecture
        self._shapes = architecture.classifier_shapes()
        self._graphs = {name: engine.open(name, graphs[name]) for name in (HEAD, LOSS)}
        self._trained = {n: np.zeros(s, dtype=np.float32) for n, s in self._shapes.items()}
        self._frozen: dict[str, Value] = {}
        for name, shape in self._graphs[HEAD].inputs.items():
            full_name = name.removeprefix(_WEIGHT)
            if full_name == name or full_name in self._shapes:
                continue
            weight = weights.get(full_name)
            if weight.shape != shape:
                raise ModelError(
                    f"weight {full_name} has shape {list(weight.shape)}, but {HEAD} asks for "
                    f"{list(shape)}: graph and weights are not of the same model"
                )
            self._frozen[name] = engine.put(weight)
        self._values: dict[str, Value] = {}
        self.refresh()

    def replace(self, tensors: ClassifierTensors) -> None:
        """Take these weights for the classifier.

        Raises:
            ProtocolError: there is none.
            NumericsError: as `check_classifier`; nothing changed.
        """
        if not self._shapes:
            raise ProtocolError("weights of a classifier came, but this run learns to write text")
        check_classifier(tensors, self._shapes)
        self._trained = {n: np.array(a, dtype=np.float32, order="C") for n, a in tensors.items()}
        self.refresh()

    def refresh(self) -> None:
        """Put the classifier as it is now where the graphs find it."""
        own = {f"{_WEIGHT}{name}": self._engine.put(a) for name, a in self._trained.items()}
        self._values = {**self._frozen, **own}

    def trained(self) -> dict[str, tuple[Array32, ...]]:
        """Return the classifier's weights by full name, to be updated in place."""
        return {name: (array,) for name, array in self._trained.items()}

    def tensors(self) -> ClassifierTensors:
        """Return copies of the classifier's weights."""
        return {name: array.copy() for name, array in self._trained.items()}

    def judge(
        self, hidden_MD: Array32, labels_M: npt.NDArray[np.int32], *, train: bool
    ) -> JudgedRows:
        """Return the summed cross entropy of the rows with a target, and with ``train`` gradients.

        ``labels_M``: -100 where a row predicts nothing.
        """
        (with_target,) = np.nonzero(labels_M >= 0)
        targets = labels_M[with_target].astype(np.int64)
        gradient_MD = np.zeros_like(hidden_MD) if train else None
        loss_sum, counts = 0.0, []
        gradients: dict[str, Array32] = {}
        for start in range(0, len(with_target), self._chunk_rows):
            chunk = slice(start, start + self._chunk_rows)
            found = self._run(hidden_MD[with_target[chunk]], targets[chunk], train=train)
            loss_sum += float(found["loss"].sum(dtype=np.float64))
            if gradient_MD is not None:
                gradient_MD[with_target[chunk]] = found["gradient.hidden"]
                for name in self._shapes:
                    gradient = found[f"gradient.{_WEIGHT}{name}"]
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
            if self._shapes:
                chosen = found["logits"].argmax(axis=1).tolist()
                classes = self._architecture.class_count
                counts.append(counted(targets[chunk].tolist(), chosen, classes=classes))
        return JudgedRows(loss_sum, gradient_MD, gradients, total(counts))

    @property
    def _chunk_rows(self) -> int:
        return max(16, CHUNK_LOGITS // self._architecture.output_count)

    def _run(
        self, hidden_CD: Array32, targets_C: npt.NDArray[np.int64], *, train: bool
    ) -> dict[str, npt.NDArray[np.float32]]:
        values = {
            **self._values,
            "hidden": self._engine.put(hidden_CD),
            "targets": self._engine.put(targets_C),
        }
        found = self._graphs[HEAD if train else LOSS].run(values)
        return {name: value.numpy() for name, value in found.items()}
