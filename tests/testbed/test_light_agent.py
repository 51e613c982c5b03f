"""A device with `hsplit[onnx]` and nothing else, in real runs.

One run to its end, beside an agent with torch, in which the light agent measures itself first; and
one in which it is alone, is looked into, killed, comes back and is stopped.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import PeftModel

from shared import program
from tests.support import light_environment
from tests.testbed import small_run
from tests.testbed.system import Process, System, broker

# PEFT 0.21 asks transformers 5.23 by a name that is going away; neither is ours to change.
pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first test waits for the environment, an export and a run
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

PATIENCE_S = 300.0
"""For what comes after an export on a busy machine."""


@pytest.fixture(scope="module")
def light_agent() -> Path:
    return light_environment.light_environment() / "hsplit-agent"


@dataclass
class Ran:
    """A finished run."""

    system: System
    nano: Process
    codes: dict[str, int]
    text: dict[str, small_run.Text]


def start(system: System, light_agent: Path, device: str, *, name: str | None = None) -> Process:
    """Start the light agent on a device's text."""
    text = small_run.write_text(system.folder / "text")[device]
    return system.agent(device, text.data, *text.flags(), name=name, program=light_agent)


def mapped_files(process: Process) -> set[str]:
    """Return the names of the files that are mapped into a process: its libraries."""
    lines = Path(f"/proc/{process.popen.pid}/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]).name for line in lines if "/" in line}


@pytest.fixture(scope="module")
def ran(light_agent, tmp_path_factory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("light")
    plan = {"batch": 4, "micro_batch": 2, "devices": {"workstation": {"split_layer": 4, "r": 8}}}
    with broker(folder) as url, System(folder / "system", url) as system:
        coordinator = system.coordinator(
            small_run.settings(plan=plan, rounds={"count": 2, "steps": 6})
        )
        nano = start(system, light_agent, "nano")
        text = small_run.write_text(system.folder / "text")
        torchs = text["workstation"]
        workstation = system.agent("workstation", torchs.data, *torchs.flags())
        programs = (coordinator, nano, workstation)
        codes = {one.name: one.wait(PATIENCE_S) for one in programs}
        yield Ran(system, nano, codes, text)


def test_every_program_ends_well_and_the_loss_falls(ran):
    assert ran.codes == {"coordinator": 0, "nano": 0, "workstation": 0}, ran.nano.text()
    evaluated = [line for line in ran.system.metrics() if "eval/loss" in line]
    assert len(evaluated) == 3
    assert evaluated[-1]["eval/perplexity"] < 0.7 * evaluated[0]["eval/perplexity"]
    assert all("device/nano/perplexity" in line for line in evaluated)
    assert ran.system.summary()["devices"]["nano"]["target_tokens"] > 0


def test_its_adapter_has_the_loss_that_the_run_reported(ran):
    opened = PeftModel.from_pretrained(
        small_run.plain_model(), str(ran.system.run_folder / "adapter")
    )
    files = [text.held_out for text in ran.text.values()]
    reported = [line["eval/loss"] for line in ran.system.metrics() if "eval/loss" in line]
    assert small_run.held_out_loss(opened.eval(), files) == pytest.approx(reported[-1], abs=1e-4)


def test_the_light_agent_measured_itself_and_warned_of_nothing(ran):
    text = ran.nano.text()
    assert "measuring this device at micro-batches of 2" in text
    # What else this machine does is no fault of the agent's.
    told = [line for line in text.splitlines() if "this device was busy while it was" not in line]
    assert not [line for line in told if re.search("WARNING|ERROR|Traceback", line)], text


def test_it_has_no_torch_in_memory_and_killed_it_is_taken_back_and_stopped_it_ends(
    light_agent, tmp_path
):
    with broker(tmp_path) as url, System(tmp_path / "system", url) as system:
        # More rounds than there is time for: nothing here is to end by itself.
        coordinator = system.coordinator(
            small_run.settings(
                devices={"min": 1, "expected": 1}, rounds={"count": 9999, "steps": 2}
            )
        )
        nano = start(system, light_agent, "nano")
        system.wait_for_step(coordinator, 1, timeout_s=PATIENCE_S)
        mapped = mapped_files(nano)
        assert any("onnxruntime" in name for name in mapped)
        assert not [name for name in mapped if "torch" in name or "c10" in name]
        nano.send(signal.SIGKILL)
        assert nano.wait() == -signal.SIGKILL
        system.wait_for_line(coordinator, "nano is gone")
        closed = max((m["step"] for m in system.metrics() if "train/loss" in m), default=0)
        again = start(system, light_agent, "nano", name="again")
        system.wait_for_step(coordinator, closed + 3, timeout_s=PATIENCE_S)
        again.send(signal.SIGINT)
        assert again.wait() == program.INTERRUPTED
        assert "stopped by Ctrl-C" in again.text()
        assert "Traceback" not in again.text()
        coordinator.send(signal.SIGTERM)
        assert coordinator.wait() == program.TERMINATED
