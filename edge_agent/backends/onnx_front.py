"""The front of a model in graphs: embeddings and blocks, forward, backward, and for importance.

Shape suffixes: B sequences, T padded length, S = B·T rows, N packed tokens, D hidden size, I and O
in and out features.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.backends.adapted_module import AdaptedModule
from edge_agent.backends.base import TokenBatch
from edge_agent.backends.dropout_masks import DropoutMasks
from edge_agent.backends.frozen_weights import (
    Array32,
    FrozenWeight,
    FrozenWeights,
    graph_inputs,
)
from edge_agent.backends.onnx_engine import Engine, Graph, Value
from edge_agent.backends.packed_rows import PackedRows
from shared.adapters import AdapterState, HeldAdapters
from shared.architecture import ModelArchitecture
from shared.errors import ModelError, ProtocolError
from shared.graphs import DIRECTIONS, EMBEDDINGS, Direction, adds_to_tokens, block_kind, graph_name

_WEIGHT = "weight."


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """What the backward pass of one micro-batch needs: each block's inputs and what it kept.

    ``values_of`` is empty for blocks below the lowest that learns.
    """

    rows: PackedRows
    values_of: Mapping[int, Mapping[str, Value]] = field(default_factory=dict)


class OnnxFront:
    """Embeddings and blocks 0 to k - 1 with their adapters. Not thread-safe."""

    def __init__(
        self,
        engine: Engine,
        graphs: Mapping[str, Path],
        weights: FrozenWeights,
        *,
        architecture: ModelArchitecture,
        config_json: str,
        split_layer: int,
        lora_dropout: float,
        int8_blocks: int = 0,
    ) -> None:
        """Open the graphs, and put the weights where they are used.

        Raises:
            ModelError: a graph or a tensor is missing, or they do not belong together.
        """
        self._engine = engine
        self._files = graphs
        self._weights = weights
        self._architecture = architecture
        self._dropout = DropoutMasks(lora_dropout) if lora_dropout else None
        config = json.loads(config_json)
        self._kinds = [
            block_kind(config, block, int8_blocks=int8_blocks) for block in range(split_layer)
        ]
        self._opened: dict[str, Graph] = {}
        for kind in dict.fromkeys(self._kinds):
            for direction in DIRECTIONS:
                self._open(graph_name(kind, direction))
        self._modules = self._linear_modules()
        self._frozen = [self._frozen_values(block) for block in range(split_layer)]
        self._held: list[dict[str, Value]] = [{} for _ in range(split_layer)]
        self._embeddings = self._embedding_values()
        self._hold(self._modules)

    # --- adapters -----------------------------------------------------------------------------

    def replace(self, adapters: HeldAdapters, *, fold: bool) -> None:
        """Replace the adapters of the named modules; all or nothing. See `Backend.set_adapters`.

        Raises:
            ProtocolError: a name is no linear module of this part that graphs adapt, or its weight
                is in 8 bits and something is to be folded into it.
            NumericsError: a factor has the wrong shape or is not finite.
        """
        for name, adapter in adapters.items():
            self.module(name).check(name, adapter, fold=fold)
        for name, adapter in adapters.items():
            self._modules[name].replace(adapter, fold=fold)
        self._hold(adapters)

    def refresh(self) -> None:
        """Put the trained pairs as they are now where the graphs find them."""
        for name, module in self._modules.items():
            if module.rank:
                self._put(name, module.trained())

    def _hold(self, names: Iterable[str]) -> None:
        """Put all that these modules hold, their weights included."""
        for name in names:
            module, (block, inside) = self._modules[name], self._place(name)
            self._held[block].update(self._values_of(module.weight, f"{inside}.weight"))
            self._put(name, {**module.trained(), **module.fixed()})

    def _put(self, name: str, arrays: Mapping[str, Array32]) -> None:
        """Put some of what a module holds, by the first part of its inputs' names."""
        block, inside = self._place(name)
        values = {f"{part}.{inside}": self._engine.put(array) for part, array in arrays.items()}
        self._held[block].update(values)

    def module(self, name: str) -> AdaptedModule:
        """Return a linear module by its full path.

        Raises:
            ProtocolError: there is none here that the graphs adapt.
        """
        found = self._modules.get(name)
        if found is None:
            raise ProtocolError(f"{name} is no linear module held here that the graphs adapt")
        return found

    def trained(self, *, freeze_a: bool) -> dict[str, tuple[Array32, ...]]:
        """Return what is trained by module, to be updated in place: A and B, or B alone."""
        return {
            name: (module.b_OR,) if freeze_a else (module.a_RI, module.b_OR)
            for name, module in self._modules.items()
            if module.rank
        }

    def read(self) -> AdapterState:
        """Return copies of all trained pairs."""
        return {name: one.pair() for name, one in self._modules.items() if one.rank}

    # --- passes -------------------------------------------------------------------------------

    def forward(
        self, batch: TokenBatch, *, keep_from: int | None, dropout_seed: int | None = None
    ) -> tuple[Array32, Passed]:
        """Return the activations (N, D) and what backward needs from block ``keep_from`` on.

        ``keep_from`` None: nothing. ``dropout_seed`` None: nothing is dropped.
        """
        rows = PackedRows(batch.lengths)
        hidden = self._engine.put(self._embed(batch, rows))
        lengths = {"lengths": self._engine.put(rows.lengths_B)}
        kept: dict[int, Mapping[str, Value]] = {}
        for block in range(len(self._kinds)):
            graph = self._graph(block, "forward")
            trains = keep_from is not None and block >= keep_from
            masks = self._masks(graph, block, hidden.shape(), dropout_seed)
            own = {"hidden": hidden, **lengths, **masks}
            found = graph.run({**self._of(block), **own}, wanted=None if trains else ("output",))
            hidden = found.pop("output")
            if trains:
                kept[block] = {**own, **found}
        activations: Array32 = rows.unpad(hidden.numpy())
        return activations, Passed(rows, kept)

    @property
    def lowest(self) -> int | None:
        """The lowest block that learns: backward ends there; None: none does."""
        blocks = [self._place(name)[0] for name, one in self._modules.items() if one.rank]
        return min(blocks, default=None)

    def backward(self, passed: Passed, gradient_ND: Array32) -> dict[str, tuple[Array32, Array32]]:
        """Return the gradients of A and B by module, of those that have a rank."""
        gradients: dict[str, tuple[Array32, Array32]] = {}
        gradient = self._engine.put(passed.rows.pad(gradient_ND))
        for block in sorted(passed.values_of, reverse=True):
            direction: Direction = "lowest" if block == min(passed.values_of) else "backward"
            found = self._go_back(block, direction, passed, gradient)
            gradient = found.get("gradient.hidden")
            for name, inside in self._sites(block):
                if self._modules[name].rank:
                    a, b = (found[f"gradient.{letter}.{inside}"].numpy() for letter in "ab")
                    gradients[name] = a, b
        return gradients

    def importance(
        self, passed: Passed, gradient_ND: Array32, *, modules: Collection[str]
    ) -> dict[str, float]:
        """Return Σ_j |w_j ∂L/∂w_j| of the summed loss for these modules of the front."""
        sums: dict[str, float] = {}
        gradient = self._engine.put(passed.rows.pad(gradient_ND))
        for block in sorted(passed.values_of, reverse=True):
            found = self._go_back(block, "probe", passed, gradient)
            gradient = found["gradient.hidden"]
            for name, inside in self._sites(block):
                if name in modules:
                    x_SI = found[f"input.{inside}"].numpy()
                    dy_SO = found[f"gradient.kept.{inside}"].numpy()
                    sums[name] = _importance(self._modules[name], x_SI, dy_SO)
        return sums

    def _go_back(
        self, block: int, direction: Direction, passed: Passed, gradient: Value
    ) -> dict[str, Value]:
        values = {**self._of(block), **passed.values_of[block], "gradient": gradient}
        return self._graph(block, direction).run(values)

    # --- inputs -------------------------------------------------------------------------------

    def _embed(self, batch: TokenBatch, rows: PackedRows) -> Array32:
        family = self._architecture.family
        tokens = self._weights.rows(f"{family.token_embedding}.weight", batch.input_ids)
        if not adds_to_tokens(family):
            return np.asarray(rows.pad(tokens))
        values = {"tokens": self._engine.put(rows.pad(tokens))}
        if family.encoder is not None:
            types = batch.token_types
            types = np.zeros_like(batch.input_ids) if types is None else types
            values["token_types"] = self._engine.put(rows.pad(types.astype(np.int64)))
        graph = self._open(EMBEDDINGS)
        found: Array32 = graph.run({**self._embeddings, **values})["output"].numpy()
        return found

    def _masks(
        self, graph: Graph, block: int, shape: list[int], seed: int | None
    ) -> dict[str, Value]:
        if self._dropout is None:
            return {}
        masks: dict[str, npt.NDArray[np.float32]] = {}
        for name, inside in self._sites(block):
            features = self._modules[name].features[0]
            size = (shape[0] * shape[1], features)
            mask = (
                np.ones(size, dtype=np.float32)
                if seed is None
                else self._dropout.mask_MI(seed, name, shape=size)
            )
            masks[f"mask.{inside}"] = mask.reshape(shape[0], shape[1], features)
        return {n: self._engine.put(m) for n, m in masks.items() if n in graph.inputs}

    def _of(self, block: int) -> dict[str, Value]:
        return {**self._frozen[block], **self._held[block]}

    # --- building -----------------------------------------------------------------------------

    def _graph(self, block: int, direction: Direction) -> Graph:
        return self._open(graph_name(self._kinds[block], direction))

    def _open(self, name: str) -> Graph:
        if name not in self._opened:
            if name not in self._files:
                raise ModelError(f"the coordinator gave no {name}, which this part needs")
            self._opened[name] = self._engine.open(name, self._files[name])
        return self._opened[name]

    def _linear_modules(self) -> dict[str, AdaptedModule]:
        """Return the modules that the graphs adapt, by full path."""
        inputs_first = self._architecture.family.inputs_first
        found = {}
        for block in range(len(self._kinds)):
            graph = self._graph(block, "forward")
            for inside in self._architecture.linears:
                if f"a.{inside}" in graph.inputs:
                    name = f"{self._architecture.block_path(block)}.{inside}"
                    weight = self._weight(graph, f"{inside}.weight", f"{name}.weight")
                    found[name] = AdaptedModule(weight, inputs_first=inputs_first)
        return found

    def _frozen_values(self, block: int) -> dict[str, Value]:
        """Return the block's weights, but those of modules that the graphs adapt."""
        path = self._architecture.block_path(block)
        graphs = [self._graph(block, direction) for direction in ("forward", "backward")]
        names = dict.fromkeys(name for graph in graphs for name in graph.inputs)
        values: dict[str, Value] = {}
        for name in names:
            inside = name.removeprefix(_WEIGHT)
            module = f"{path}.{inside.removesuffix('.weight')}"
            if inside != name and module not in self._modules:
                values |= self._values_of(
                    self._weight(graphs[0], inside, f"{path}.{inside}"), inside
                )
        return values

    def _embedding_values(self) -> dict[str, Value]:
        if not adds_to_tokens(self._architecture.family):
            return {}
        graph = self._open(EMBEDDINGS)
        names = [name.removeprefix(_WEIGHT) for name in graph.inputs if name.startswith(_WEIGHT)]
        values: dict[str, Value] = {}
        for name in names:
            values |= self._values_of(self._weight(graph, name, name), name)
        return values

    def _values_of(self, weight: FrozenWeight, name: str) -> dict[str, Value]:
        return {n: self._engine.put(array) for n, array in graph_inputs(weight, name).items()}

    def _weight(self, graph: Graph, inside: str, name: str) -> FrozenWeight:
        is_int8 = f"scale.{inside}" in graph.inputs
        weight = self._weights.int8(name) if is_int8 else self._weights.get(name)
        expected = graph.inputs.get(f"{_WEIGHT}{inside}", weight.shape)
        if weight.shape != expected:
            raise ModelError(
                f"weight {name} has shape {list(weight.shape)}, but {graph.name} asks for "
                f"{list(expected)}: graph and weights are not of the same model"
            )
        return weight

    def _sites(self, block: int) -> list[tuple[str, str]]:
        """Return (full path, path inside the block) of the block's adaptable modules."""
        prefix = f"{self._architecture.block_path(block)}."
        return [(name, name[len(prefix) :]) for name in self._modules if name.startswith(prefix)]

    def _place(self, name: str) -> tuple[int, str]:
        block = self._architecture.block_of(name)
        return block, name[len(self._architecture.block_path(block)) + 1 :]


_CHUNK_WEIGHTS = 1 << 22
"""Entries of ∂L/∂W held at once: 16 MiB."""


def _importance(module: AdaptedModule, x_SI: Array32, dy_SO: Array32) -> float:
    """Return Σ |W ∘ (∂Yᵀ X)|; rows of padding add nothing, for their ∂Y is zero.

    See `shared.modeling.importance`, which is the same in torch.
    """
    total = 0.0
    rows = max(1, _CHUNK_WEIGHTS // x_SI.shape[1])
    for start in range(0, dy_SO.shape[1], rows):
        chunk = slice(start, start + rows)
        product_CI: npt.NDArray[Any] = dy_SO[:, chunk].T @ x_SI
        product_CI *= module.effective_CI(chunk)
        total += float(np.abs(product_CI).sum(dtype=np.float64))
    return total
