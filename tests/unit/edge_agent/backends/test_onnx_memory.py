"""What of a GPU's memory is onnxruntime's, over stand-ins for NVIDIA's library and a Jetson."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.backends.onnx_memory import OnnxMemory
from shared.errors import ConfigError
from shared.memory_use import TYPICAL_CONTEXT_BYTES, AcceleratorMemory
from tests.support.nvml_machines import absent_library, compile_library
from tests.support.sysfs_trees import LAPTOP, ORIN_NANO, build, meminfo, process

MIB = 2**20
_PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from edge_agent.backends.onnx_memory import OnnxMemory
from shared.errors import ConfigError

memory = OnnxMemory(int(sys.argv[1]), root=Path(sys.argv[2]))
memory.context_made()
found = {"name": memory.name, "taken": []}
try:
    found["taken"] = [dataclasses.asdict(memory.taken()) for _ in range(2)]
except ConfigError as error:
    found["error"] = str(error)
memory.close()
print(json.dumps(found))
"""


def ask(library: Path, root: Path, *, gpu: int = 0) -> dict[str, Any]:
    """Return what is said in a process that finds ``library``: the GPU's name, twice its memory."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(gpu), str(root)],
        env=os.environ | {"LD_LIBRARY_PATH": str(library)},
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_what_comes_first_is_the_context_and_the_rest_is_used(tmp_path):
    """It has 1152 MiB used before, 1536 with a context, then 2176 and 3072."""
    library = compile_library("FILLS_UP", tmp_path)
    found = ask(library, build(tmp_path / "root", LAPTOP))
    assert found["name"] == "NVIDIA GeForce RTX 4070"
    expected = [
        AcceleratorMemory(
            used_bytes=used * MIB, peak_bytes=used * MIB, runtime_bytes=384 * MIB, is_own=True
        )
        for used in (2176 - 1536, 3072 - 1536)
    ]
    assert [AcceleratorMemory(**one) for one in found["taken"]] == expected


def test_a_context_that_was_there_before_is_taken_for_a_typical_one(tmp_path):
    found = ask(compile_library("DISCRETE", tmp_path), build(tmp_path / "root", LAPTOP), gpu=1)
    assert found["name"] == "NVIDIA RTX A2000"
    first = AcceleratorMemory(**found["taken"][0])
    assert (first.used_bytes, first.runtime_bytes) == (0, TYPICAL_CONTEXT_BYTES)


@pytest.mark.parametrize("kind", ["LOST", "GARBAGE", None])
def test_a_gpu_of_which_nothing_says_what_is_used_cannot_be_measured(kind, tmp_path):
    library = absent_library(tmp_path) if kind is None else compile_library(kind, tmp_path)
    found = ask(library, build(tmp_path / "root", LAPTOP), gpu=0)
    assert found["taken"] == []
    assert "nothing says how much memory of GPU 0 is used" in found["error"]
    assert "hsplit[nvidia]" in found["error"]


@pytest.fixture
def orin(tmp_path) -> Path:
    return build(tmp_path, ORIN_NANO, process(), meminfo(total_mib=7600, available_mib=5000))


def test_a_jetsons_gpu_takes_what_the_machine_no_longer_has_available(orin):
    memory = OnnxMemory(0, root=orin)
    build(orin, meminfo(total_mib=7600, available_mib=4700))
    memory.context_made()
    build(orin, meminfo(total_mib=7600, available_mib=4600))
    taken = memory.taken()
    assert memory.name.startswith("NVIDIA Jetson Orin Nano")
    assert taken == AcceleratorMemory(
        used_bytes=100 * MIB, peak_bytes=100 * MIB, runtime_bytes=300 * MIB, is_own=False
    )


def test_what_the_process_has_of_a_jetsons_memory_itself_is_not_the_gpus(orin):
    memory = OnnxMemory(0, root=orin)
    memory.context_made()
    own_kib = 506880 + 80 * 1024
    status = process()["proc/self/status"].replace("506880", str(own_kib))
    build(orin, {"proc/self/status": status}, meminfo(total_mib=7600, available_mib=5000 - 80 - 30))
    assert memory.taken().used_bytes == 30 * MIB
    assert memory.taken().runtime_bytes == TYPICAL_CONTEXT_BYTES


def test_a_container_on_a_jetson_sees_the_gpus_memory_all_the_same(orin):
    """Its own limit is nearer than the machine's memory, and the GPU's is not counted there."""
    limit = {"sys/fs/cgroup/memory.max": f"{1024 * MIB}\n", "sys/fs/cgroup/memory.current": "1\n"}
    build(orin, limit)
    memory = OnnxMemory(0, root=orin)
    memory.context_made()
    build(orin, meminfo(total_mib=7600, available_mib=4900))
    assert memory.taken().used_bytes == 100 * MIB


def test_memory_that_others_gave_back_is_not_less_than_none(orin):
    memory = OnnxMemory(0, root=orin)
    memory.context_made()
    build(orin, meminfo(total_mib=7600, available_mib=6000))
    assert memory.taken().used_bytes == 0


def test_a_jetson_that_says_nothing_of_its_memory_cannot_be_measured(orin):
    (orin / "proc" / "meminfo").unlink()
    with pytest.raises(ConfigError, match="split_layer"):
        OnnxMemory(0, root=orin).taken()
