"""Which backend computes where nobody says so, and what is said where one is not installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edge_agent.backends import PACKAGES, chosen_backend, open_backend
from edge_agent.emulation import Emulation, emulated
from shared.errors import ConfigError
from tests.support.backends_with_graphs import WithGraphs


@pytest.fixture
def without(monkeypatch):
    """Return what takes packages away: Python finds none where ``sys.modules`` says None."""

    def take_away(*packages: str) -> None:
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return take_away


def test_torch_is_taken_where_it_is_installed():
    assert chosen_backend("auto") == "torch"


@pytest.mark.parametrize("missing", PACKAGES["torch"])
def test_onnx_is_taken_where_torch_lacks_something(without, missing):
    without(missing)
    assert chosen_backend("auto") == "onnx"


def test_nothing_installed_is_an_error_that_says_what_to_install(without):
    without("torch", "onnxruntime")
    with pytest.raises(ConfigError, match=r"pip install 'hsplit\[onnx\]', or 'hsplit\[torch\]'"):
        chosen_backend("auto")
    with pytest.raises(ConfigError, match="nothing is installed"):
        open_backend("auto")


@pytest.mark.parametrize("name", PACKAGES)
def test_what_was_asked_for_by_name_is_not_replaced_by_another(name):
    assert chosen_backend(name) == name
    assert open_backend(name, device="cpu", threads=1).name == name


def test_what_is_asked_for_by_name_must_be_installed(without, monkeypatch):
    without("onnxruntime")
    for module in [name for name in sys.modules if name.startswith("edge_agent.backends.onnx")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ConfigError, match=r"needs onnxruntime.*pip install 'hsplit\[onnx\]'"):
        open_backend("onnx")


def test_choosing_imports_nothing():
    asked = (
        "import json, sys; from edge_agent.backends import chosen_backend; "
        "print(json.dumps([chosen_backend('auto'), *sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=60
    )
    chosen, *imported = json.loads(done.stdout)
    assert chosen == "torch"
    assert not {"torch", "transformers", "onnxruntime"} & set(imported)


@pytest.mark.parametrize(("name", "needs"), [("torch", False), ("onnx", True)])
def test_a_backend_says_whether_it_needs_graphs(name, needs):
    assert open_backend(name, device="cpu", threads=1).needs_graphs is needs


def test_a_smaller_device_needs_the_same():
    assert emulated(WithGraphs(), Emulation(speed=0.5)).needs_graphs
    assert not emulated(open_backend("torch"), Emulation(speed=0.5)).needs_graphs
