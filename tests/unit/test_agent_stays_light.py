"""The agent starts without torch: proved in processes of their own."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft"}
REPORT = (
    "import importlib, json, sys; importlib.import_module({!r}); print(json.dumps([*sys.modules]))"
)


@pytest.mark.parametrize(
    "module",
    [
        "edge_agent.cli",
        "edge_agent.agent",
        "edge_agent.backends",
        "shared.transport.mqtt",
        "shared.protocol.codec",
        "shared.architecture",
    ],
)
def test_importing_it_loads_no_heavy_library(module):
    program = REPORT.format(module)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert HEAVY.isdisjoint(json.loads(done.stdout))
