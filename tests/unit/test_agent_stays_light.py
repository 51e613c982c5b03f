"""The agent starts without torch: proved in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript"}
TORCHS = {"edge_agent.backends.torch_backend"}
MODELING = "shared.modeling"
ROOT = Path(__file__).parents[2]
REPORT = (
    "import importlib, json, sys; [importlib.import_module(name) for name in {!r}]; "
    "print(json.dumps([*sys.modules]))"
)


def modules_of(package: str) -> list[str]:
    """Return all modules of a package that a light agent may import."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / package).rglob("*.py")
    ]
    return sorted(name for name in names if name not in TORCHS and not name.startswith(MODELING))


@pytest.mark.parametrize(
    "module",
    [
        "edge_agent.cli",
        "edge_agent.agent",
        "edge_agent.backends",
        "edge_agent.program",
        "shared.transport.mqtt",
        "shared.protocol.codec",
        "shared.architecture",
    ],
)
def test_importing_it_loads_no_heavy_library(module):
    assert HEAVY.isdisjoint(loaded_by([module]))


@pytest.mark.parametrize("package", ["edge_agent", "shared"])
def test_nor_do_all_modules_together_but_torchs_own(package):
    names = modules_of(package)
    loaded = loaded_by(names)
    assert set(names) <= loaded
    assert HEAVY.isdisjoint(loaded)


def loaded_by(names: list[str]) -> set[str]:
    """Return what a Python of its own has loaded after importing these modules."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(names)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))
