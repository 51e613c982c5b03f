"""Machines with a driver of their own: the real pynvml, over libraries that the tests compile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_SOURCE = Path(__file__).with_name("nvml_library.c")
_REPOSITORY = Path(__file__).parents[2]
_LIBRARY = "libnvidia-ml.so.1"
_PROGRAM = """
import dataclasses, json, logging, sys, threading
from pathlib import Path

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
{before}
from edge_agent.sensors import nvml_library, open_sensors

{patience}
sensors = open_sensors(root=Path({root!r}), gpu={gpu!r})
facts = sensors.facts()
nvml_library.ANSWER_WITHIN_S = {answer_within_s}
reports = []
for _ in range(2):
    reading = sensors.read(on_gpu={on_gpu})
    memory = [sensors.memory_bytes(on_gpu=True), sensors.memory_bytes(on_gpu=False)]
    reports.append({{"telemetry": dataclasses.asdict(reading), "memory": memory}})
sensors.close()
after = dataclasses.asdict(sensors.read())
stuck = sum(thread.name == "nvml" for thread in threading.enumerate())
found = {{"facts": dataclasses.asdict(facts), "reports": reports, "after": after, "stuck": stuck}}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Report:
    """What the sensors said on one machine, twice, and what they logged.

    ``left_behind``: threads that still wait for the driver.
    """

    facts: dict[str, Any]
    telemetry: dict[str, Any]
    gpu_memory_bytes: int | None
    host_memory_bytes: int | None
    after_close: dict[str, Any]
    log: list[str]
    left_behind: int


def compile_library(kind: str, folder: Path) -> Path:
    """Compile the library of one kind of machine; return the folder that it is in."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc or gcc), so nothing can stand in for NVIDIA's library")
    output = folder / kind / _LIBRARY
    output.parent.mkdir()
    command = [compiler, "-shared", "-fPIC", "-O0", "-w", f"-D{kind}"]
    subprocess.run([*command, "-o", str(output), str(_SOURCE)], check=True, timeout=60)
    return output.parent


def absent_library(folder: Path) -> Path:
    """Return a folder whose library cannot be loaded, whatever this machine really has."""
    (folder / "absent").mkdir()
    (folder / "absent" / _LIBRARY).write_bytes(b"")
    return folder / "absent"


def ask(
    library: Path,
    *,
    root: Path,
    gpu: int | None = 0,
    on_gpu: bool | None = None,
    before: str = "",
    answer_within_s: float = 30.0,
    patient_start: bool = True,
) -> Report:
    """Open the sensors in a process that finds ``library``, read them twice, close them.

    ``before`` runs before anything is imported. With a small ``answer_within_s`` a hang is not
    waited for; with ``patient_start`` only after the start.
    """
    start_s = 30.0 if patient_start else answer_within_s
    program = _PROGRAM.format(
        before=before,
        patience=f"nvml_library.ANSWER_WITHIN_S = {start_s}",
        root=str(root),
        gpu=gpu,
        on_gpu=on_gpu,
        answer_within_s=answer_within_s,
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=_REPOSITORY,
        env=os.environ | {"LD_LIBRARY_PATH": str(library)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    last = found["reports"][-1]
    return Report(
        facts=found["facts"],
        telemetry=last["telemetry"],
        gpu_memory_bytes=last["memory"][0],
        host_memory_bytes=last["memory"][1],
        after_close=found["after"],
        log=done.stderr.splitlines(),
        left_behind=found["stuck"],
    )
