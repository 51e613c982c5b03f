"""What `pip install 'hsplit[onnx]'` makes is light: shown in an environment that holds no more."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from shared.errors import ConfigError
from tests.support import light_environment
from tests.support.installed_sizes import closure_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HEAVY = {"torch", "transformers", "peft", "accelerate", "triton"}
EXPORTS = {"onnx", "onnx-ir", "onnxscript"}
"""What makes graphs: the coordinator's."""

INSTALLED = """
import json
from importlib import metadata
print(json.dumps(sorted({one.metadata["Name"] for one in metadata.distributions()})))
"""

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import edge_agent, shared
TORCH_ALONE = ("edge_agent.backends.torch_backend", "shared.modeling")
names = [
    one.name
    for package in (edge_agent, shared)
    for one in pkgutil.walk_packages(package.__path__, package.__name__ + ".",
                                     onerror=lambda name: None)
    if not one.name.startswith(TORCH_ALONE)
]
for name in names:
    importlib.import_module(name)
print(json.dumps({"imported": names, "loaded": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def programs() -> Path:
    return light_environment.light_environment()


def run(*command: str | Path) -> str:
    """Run outside of the repository, whose packages would be found before those installed."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=light_environment.FOLDER,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_it(programs: Path, text: str) -> Any:
    return json.loads(run(programs / "python", "-I", "-c", text))


def test_no_heavy_package_is_installed(programs: Path):
    installed = {canonicalize_name(name) for name in in_it(programs, INSTALLED)}
    assert {"hsplit", "onnxruntime", "numpy", "tokenizers", "safetensors"} <= installed
    assert installed.isdisjoint(HEAVY | EXPORTS)
    assert [name for name in installed if name.startswith("nvidia-")] == []


def test_every_module_of_the_agent_can_be_imported_there_and_loads_none(programs: Path):
    found = in_it(programs, IMPORT_ALL)
    assert {"edge_agent.cli", "edge_agent.program", "shared.protocol.codec"} <= {*found["imported"]}
    roots = {name.split(".")[0] for name in found["loaded"]}
    assert roots.isdisjoint(HEAVY | {"onnx", "onnx_ir", "onnxscript"})


def test_the_agent_starts_there(programs: Path):
    assert "COMMAND" in run(programs / "hsplit-agent", "--help")
    assert run(programs / "hsplit-agent", "--version").startswith("hsplit ")


def test_the_coordinator_says_there_what_to_install(programs: Path):
    done = subprocess.run(
        [programs / "hsplit-coordinator", "run", "run.yaml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=light_environment.FOLDER,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith("hsplit: this command needs ")
    assert "pip install 'hsplit[coordinator]'" in done.stderr


def test_the_torch_backend_says_there_what_to_install(programs: Path):
    text = (
        "from edge_agent.backends import open_backend\n"
        "from shared.errors import ConfigError\n"
        "try: open_backend('torch')\n"
        "except ConfigError as error: print(error)\n"
    )
    assert "pip install 'hsplit[torch]'" in run(programs / "python", "-I", "-c", text)


def test_it_takes_less_than_a_third_of_the_torch_agents(
    programs: Path, record_property, capsys: pytest.CaptureFixture[str]
):
    light = light_environment.installed_bytes()
    torch = closure_bytes("hsplit", "torch")
    record_property("light_environment_megabytes", round(light / 1e6))
    record_property("torch_environment_megabytes", round(torch / 1e6))
    with capsys.disabled():
        print(f"\nlight agent: {light / 1e6:.0f} MB, with torch (CPU): {torch / 1e6:.0f} MB")
    assert light < torch / 3
