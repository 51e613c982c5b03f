"""A backend that asks for graphs, and shows which files it was given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_agent.backends.base import FrontBase
from edge_agent.backends.torch_backend import TorchBackend


class WithGraphs(TorchBackend):
    """Computes with torch, but wants graphs before it does. ``given``: those of its last part."""

    needs_graphs = True

    def __init__(self) -> None:
        super().__init__("cpu", threads=1)
        self.given: Mapping[str, Path] = {}

    def load(self, base: FrontBase, **terms: object) -> None:  # type: ignore[override]
        self.given = base.graphs
        super().load(base, **terms)  # type: ignore[arg-type]
