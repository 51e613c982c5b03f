"""A real child measures; children that die leave what they had said, or a clear error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_agent import probing
from edge_agent.probe_spec import LINE, SPEC, ProbeLine, ProbeSpec
from edge_agent.probing import probe
from shared.costs import fit
from shared.errors import ConfigError, ModelError, PlanError
from shared.memory_use import resident_bytes
from shared.protocol.messages import DeviceId
from tests.support import probe_children
from tests.support.measured import measurements
from tests.support.probe_specs import probe_spec
from tests.support.tiny_models import tiny_model


def spec(folder: Path, **changes: Any) -> ProbeSpec:
    """Return what a child is told; its time is far more than it takes."""
    return probe_spec(folder, **{"threads": 1, "budget_s": 30.0, **changes})


def test_a_child_measures_what_the_costs_are_fitted_to(tmp_path):
    found = probe(spec(tmp_path))
    assert found.warnings == ()
    assert not found.on_gpu
    # This process is heavier than the child: its own size is what training comes on top of.
    assert found.runtime_bytes >= 0.9 * resident_bytes()
    assert {(p.blocks, p.sequences, p.length) for p in found.blocks} == {
        (blocks, sequences, 16) for blocks in (1, 3) for sequences in (1, 4)
    }
    assert all(p.peak_bytes > found.runtime_bytes for p in found.blocks)
    assert [p.tokens for p in found.head] == [64, 16]
    assert len({p.adapter_parameters for p in found.optimizer}) == 2
    costs = fit(
        measurements(
            runtime_bytes=found.runtime_bytes,
            blocks=found.blocks,
            head=found.head,
            optimizer=found.optimizer,
        )
    )
    few, many = (costs.backward_s(blocks=k, tokens=64, adapter_parameters=512 * k) for k in (1, 3))
    assert many > 1.5 * few
    assert costs.memory_line(tokens=64)[0] >= found.runtime_bytes


def test_pieces_of_another_model_are_an_error_that_names_the_tensor(tmp_path):
    other = tiny_model("gpt2", n_embd=64)
    with pytest.raises(ModelError, match=r"could not be measured: weight transformer\.wte"):
        probe(spec(tmp_path, config_json=json.dumps(other.config)))


@pytest.fixture
def _own_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "MODULE", probe_children.MODULE)


@pytest.mark.usefixtures("_own_children")
def test_a_child_killed_with_enough_points_leaves_them_and_a_warning(tmp_path):
    found = probe(spec(tmp_path, device_id=DeviceId("killed-4")))
    assert len(found.blocks) == 4
    (warning,) = found.warnings
    assert "the system killed it while measuring 3 blocks on 4 x 8 tokens" in warning


@pytest.mark.usefixtures("_own_children")
def test_a_child_killed_before_is_a_memory_too_small_with_its_numbers(tmp_path):
    limited = spec(tmp_path, device_id=DeviceId("killed-2"), memory_bytes=500 * 2**20)
    with pytest.raises(PlanError) as caught:
        probe(limited)
    said = str(caught.value)
    assert "2 of the 3 points needed, at up to 420 MiB of 500 MiB that it may use" in said
    assert "plan.micro_batch (4)" in said


@pytest.mark.usefixtures("_own_children")
def test_a_full_memory_that_the_child_survives_is_the_same_error(tmp_path):
    with pytest.raises(PlanError, match=r"0 of the 3 points needed.*memory is full"):
        probe(spec(tmp_path, device_id=DeviceId("plan")))


@pytest.mark.usefixtures("_own_children")
def test_an_error_of_the_settings_stays_one(tmp_path):
    with pytest.raises(ConfigError, match="could not be measured: no such device"):
        probe(spec(tmp_path, device_id=DeviceId("config")))


@pytest.mark.usefixtures("_own_children")
def test_a_child_that_crashes_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(ModelError, match="it ended with 1 .*the driver is broken"):
        probe(spec(tmp_path, device_id=DeviceId("crashed-1")))


@pytest.mark.usefixtures("_own_children")
def test_a_child_that_is_stuck_is_killed_and_what_it_said_counts(tmp_path):
    found = probe(spec(tmp_path, device_id=DeviceId("stuck-3")), timeout_s=5.0)
    assert len(found.blocks) == 3
    assert "it took more than 5 s while measuring" in found.warnings[0]
    assert not children()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_program_that_is_stopped_takes_its_child_along(tmp_path, how, code):
    pid_file = tmp_path / "stuck"
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.support.probe_parent"],
        stdin=subprocess.PIPE,
        env={**os.environ, probe_children.STUCK: str(pid_file)},
    )
    try:
        assert parent.stdin is not None
        parent.stdin.write(SPEC.dump_json(spec(tmp_path, device_id=DeviceId("stuck-3"))))
        parent.stdin.close()
        deadline_s = time.monotonic() + 60.0
        while not pid_file.exists():
            assert parent.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        child = psutil.Process(int(pid_file.read_text()))
        assert child.ppid() == parent.pid
        parent.send_signal(how)
        assert parent.wait(30.0) == code
    finally:
        parent.kill()
        parent.wait()
    assert not child.is_running()


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


def test_spec_and_lines_survive_the_way_to_the_child_and_back(tmp_path):
    sent = spec(tmp_path, memory_bytes=2**31, emulate="speed=0.5")
    assert SPEC.validate_json(SPEC.dump_json(sent)) == sent
    line = ProbeLine(runtime_bytes=5, on_gpu=True)
    assert LINE.validate_json(LINE.dump_json(line, exclude_none=True)) == line
