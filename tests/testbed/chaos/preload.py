"""Imports what both programs import sooner or later; only that: no thread, no tensor."""

import importlib

for _name in (
    "coordinator.cli",
    "coordinator.program",
    "coordinator.export",
    "edge_agent.cli",
    "edge_agent.program",
    "edge_agent.backends.torch_backend",
    "tests.testbed.chaos.programs",
    # What the export asks transformers for by name.
    "transformers.models.gpt2.modeling_gpt2",
):
    importlib.import_module(_name)
