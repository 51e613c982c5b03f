"""Which graphs a folder must have for a model to be measured."""

from __future__ import annotations

import pytest

from coordinator import demo
from edge_agent.local_graphs import graphs_of
from edge_agent.local_model import open_model
from edge_agent.settings import ProfileSettings
from shared.errors import ConfigError

BASE = demo.base_folder()
BLOCKS = [f"graph.full_attention.{way}" for way in ("forward", "backward", "lowest", "probe")]


@pytest.fixture
def folder(tmp_path):
    """What is in them nobody looks at here."""
    for name in ("graph.embeddings", *BLOCKS):
        (tmp_path / f"{name}.onnx").write_bytes(b"")
    return tmp_path


def settings(**values: object) -> ProfileSettings:
    return ProfileSettings(device_id="nano", backend="onnx", model=str(BASE), **values)


def test_with_labels_on_the_server_no_head_is_needed(folder):
    model = open_model(str(BASE))
    found = graphs_of(settings(graphs=folder, labels="server"), model)
    assert found == {name: folder / f"{name}.onnx" for name in ("graph.embeddings", *BLOCKS)}
    with pytest.raises(ConfigError, match=r"graph\.head\.onnx and 1 more.*--labels device"):
        graphs_of(settings(graphs=folder), model)


def test_a_folder_in_place_of_a_graph_is_none(folder):
    (folder / "graph.embeddings.onnx").unlink()
    (folder / "graph.embeddings.onnx").mkdir()
    with pytest.raises(ConfigError, match=r"lacks graph\.embeddings\.onnx, which"):
        graphs_of(settings(graphs=folder, labels="server"), open_model(str(BASE)))


def test_torch_needs_none_and_nothing_is_needed_without_a_model(folder):
    torch = settings().model_copy(update={"backend": "torch"})
    assert graphs_of(torch, open_model(str(BASE))) == {}
    assert graphs_of(settings(), None) == {}
