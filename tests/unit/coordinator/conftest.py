"""Children that export graphs, for all tests of the coordinator's parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coordinator.graphs import exporting
from coordinator.graphs.exporting import Export
from tests.support import graph_children


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let these children export, well unless a test says otherwise; none is left over."""
    began: list[Export] = []
    original = Export.__init__

    def noted(self: Export, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        began.append(self)

    monkeypatch.setattr(exporting, "MODULE", graph_children.MODULE)
    monkeypatch.setattr(Export, "__init__", noted)
    monkeypatch.setenv(graph_children.BEHAVIOUR, "well")
    yield
    for export in began:
        export.close()
