"""Graphs between real programs: what a coordinator that is stopped leaves behind."""

from __future__ import annotations

import signal

import psutil
import pytest

from shared import program
from tests.testbed import small_run
from tests.testbed.system import System, broker

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_coordinator_that_is_stopped_ends_its_export_and_leaves_no_half_of_it(tmp_path):
    texts = small_run.write_text(tmp_path / "text")
    folder = tmp_path / "system"
    with broker(tmp_path) as url, System(folder, url, shares_graphs=False) as system:
        coordinator = system.coordinator(small_run.settings())
        text = texts["nano"]
        system.agent("nano", text.data, *text.flags(), "--backend", "onnx")
        # From here on the child imports torch for seconds before it exports anything.
        system.wait_for_line(coordinator, "nano waits for graphs")
        (child,) = psutil.Process(coordinator.popen.pid).children()
        assert "coordinator.graphs.program" in child.cmdline()
        coordinator.send(signal.SIGTERM)
        assert coordinator.wait() == program.TERMINATED
        assert not child.is_running()
        assert not list(system.graphs.glob("*/*"))
