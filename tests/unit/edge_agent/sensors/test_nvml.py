"""The real pynvml over compiled stand-ins for NVIDIA's library, in processes of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.sensors.machine import reserve_bytes
from edge_agent.sensors.nvml import visible_gpu
from tests.support.nvml_machines import absent_library, ask, compile_library
from tests.support.sysfs_trees import LAPTOP, ORIN_NANO, build, process

MIB = 2**20
HOST_BYTES = (9000 + 500) * MIB - reserve_bytes(15900 * MIB)
"""What a CPU may use on the laptop: available, and its own, less the reserve."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvml")
    compiled = {}

    def compiled_once(kind):
        if kind not in compiled:
            compiled[kind] = compile_library(kind, folder)
        return compiled[kind]

    return compiled_once


@pytest.fixture
def laptop(tmp_path):
    return build(tmp_path, LAPTOP)


def test_a_discrete_gpu_says_everything_and_has_a_memory_of_its_own(library, laptop):
    report = ask(library("DISCRETE"), root=laptop)
    assert report.facts | {"cpus": None, "memory_bytes": None} == {
        "accelerator": "NVIDIA GeForce RTX 4070",
        "accelerator_memory_bytes": 8192 * MIB,
        "accelerator_shares_memory": False,
        "driver": "550.54.15",
        "power_mode": None,
        "memory_bytes": None,
        "cpus": None,
    }
    assert report.telemetry | {"cpu_load_percent": None} == {
        "accelerator_load_percent": 87.0,
        "accelerator_clock_mhz": 1980.0,
        "cpu_load_percent": None,
        "temperature_c": 71.0,  # the GPU's, not the processor's 66
        "power_w": 84.25,
        "free_memory_bytes": 6144 * MIB - reserve_bytes(8192 * MIB),
        "used_memory_bytes": 512 * MIB,
        "throttled": True,
        "throttle_reasons": ["software thermal slowdown", "power cap"],
    }
    assert report.gpu_memory_bytes == (6144 + 512) * MIB - reserve_bytes(8192 * MIB)
    assert report.host_memory_bytes == HOST_BYTES
    assert report.log == []
    assert report.after_close["power_w"] is None
    assert report.after_close["temperature_c"] == 66.0, "the machine is still there"


def test_training_on_the_cpu_is_told_of_the_machine_and_not_of_the_gpu(library, laptop):
    report = ask(library("DISCRETE"), root=laptop, on_gpu=False)
    assert report.telemetry["temperature_c"] == 66.0
    assert report.telemetry["accelerator_load_percent"] is None
    assert report.telemetry["free_memory_bytes"] == HOST_BYTES - 500 * MIB
    assert report.telemetry["used_memory_bytes"] == 700 * MIB


def test_an_older_driver_is_asked_in_its_own_words(library, laptop):
    report = ask(library("OLD_DRIVER"), root=laptop)
    assert report.telemetry["temperature_c"] == 71.0
    assert report.telemetry["throttle_reasons"] == ["power cap"]
    assert report.telemetry["throttled"] is False, "a cap on power is how it always works"
    assert report.telemetry["used_memory_bytes"] == 512 * MIB
    assert report.log == []


def test_on_a_jetson_the_kernel_fills_in_what_nvml_does_not_support(library, tmp_path):
    report = ask(library("JETSON"), root=build(tmp_path, ORIN_NANO))
    assert report.facts["accelerator"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert report.facts["accelerator_shares_memory"] is True
    assert report.facts["accelerator_memory_bytes"] is None
    assert report.telemetry["accelerator_load_percent"] == 87.3
    assert report.telemetry["temperature_c"] == 63.875
    shared = (5200 + 500) * MIB - reserve_bytes(7620 * MIB)
    assert report.gpu_memory_bytes == report.host_memory_bytes == shared
    assert report.log == []


def test_a_jetson_with_a_card_of_its_own_computes_in_the_cards_memory(library, tmp_path):
    report = ask(library("DISCRETE"), root=build(tmp_path, ORIN_NANO))
    assert report.facts["accelerator_memory_bytes"] == 8192 * MIB
    assert report.facts["accelerator_shares_memory"] is False
    assert report.gpu_memory_bytes == (6144 + 512) * MIB - reserve_bytes(8192 * MIB)


def test_a_gpu_in_the_machines_memory_needs_no_jetson(library, laptop):
    report = ask(library("JETSON"), root=laptop)
    assert report.facts["accelerator"] == "Orin (nvgpu)"
    assert report.facts["accelerator_shares_memory"] is True
    assert report.gpu_memory_bytes == HOST_BYTES


# --- which GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "environment", "name"),
    [
        (1, "", "NVIDIA RTX A2000"),
        (0, "CUDA_VISIBLE_DEVICES=1\0", "NVIDIA RTX A2000"),
        (1, "A=b\0CUDA_VISIBLE_DEVICES=1,0\0", "NVIDIA GeForce RTX 4070"),
        (0, "CUDA_VISIBLE_DEVICES=GPU-11111111-bbbb\0", "NVIDIA RTX A2000"),
        (0, "CUDA_VISIBLE_DEVICES=\0", None),
    ],
)
def test_it_is_the_gpu_that_cuda_means(library, tmp_path, gpu, environment, name):
    root = build(tmp_path, LAPTOP, process(environment=environment))
    report = ask(library("DISCRETE"), root=root, gpu=gpu)
    assert report.facts["accelerator"] == name
    assert (report.gpu_memory_bytes is None) == (name is None)


@pytest.mark.parametrize(
    ("gpu", "visible", "which"),
    [
        (3, None, 3),
        (1, "2, 5", 5),
        (2, "2,5", None),
        (0, "MIG-abc", "MIG-abc"),
        (1, "-1,0", None),
        (0, "-1", None),
        (1, "0,-1,1", None),
        (0, "0,-1", 0),
        (0, "²", None),
        (-1, "0", None),
    ],
)
def test_visible_devices_count_up_to_the_first_that_makes_no_sense(gpu, visible, which):
    assert visible_gpu(gpu, visible) == which


@given(gpu=st.integers(0, 20), visible=st.text(max_size=40))
def test_any_text_is_a_list_of_visible_devices(gpu, visible):
    which = visible_gpu(gpu, visible)
    assert which is None or 0 <= int(which) < 10_000 or which.startswith(("GPU-", "MIG-"))


def test_a_gpu_that_is_not_there_is_named(library, laptop):
    report = ask(library("DISCRETE"), root=laptop, gpu=7)
    assert report.facts["accelerator"] is None
    (line,) = [line for line in report.log if "does not work" in line]
    assert "GPU 7 of 2: Invalid Argument" in line


# --- none, and broken -----------------------------------------------------------------------------

ABSENT_PACKAGE = "sys.modules['pynvml'] = None"


@pytest.mark.parametrize(
    ("kind", "before"),
    [("absent", ""), ("DISCRETE", ABSENT_PACKAGE), ("NO_GPU", ""), ("NO_DRIVER", "")],
)
def test_without_package_library_driver_or_gpu_all_is_well(library, laptop, kind, before):
    found = absent_library(laptop) if kind == "absent" else library(kind)
    report = ask(found, root=laptop, before=before)
    assert report.facts["accelerator"] is None
    assert report.telemetry["temperature_c"] == 66.0
    assert report.host_memory_bytes == HOST_BYTES
    assert report.telemetry["free_memory_bytes"] == HOST_BYTES - 500 * MIB
    assert [line for line in report.log if "hsplit[nvidia]" not in line] == []


def test_who_trains_on_a_gpu_that_nothing_is_known_of_is_told_once_what_to_do(library, laptop):
    report = ask(library("DISCRETE"), root=laptop, before=ABSENT_PACKAGE, on_gpu=True)
    assert report.gpu_memory_bytes is None
    assert report.telemetry["free_memory_bytes"] is None, "the machine's would mislead"
    (line,) = report.log
    assert line.startswith("WARNING")
    assert "install hsplit[nvidia]" in line
    assert "memory_limit" in line


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("BROKEN_INIT", "nvmlInit: the moon is in the wrong phase"),
        ("HANGS_AT_INIT", "no answer within 0.3 s"),
    ],
)
def test_a_driver_that_does_not_start_is_warned_of_once_and_done_without(
    library, laptop, kind, says
):
    report = ask(library(kind), root=laptop, answer_within_s=0.3, patient_start=False)
    assert report.facts["accelerator"] is None
    assert report.telemetry["temperature_c"] == 66.0
    assert report.host_memory_bytes == HOST_BYTES
    warnings = [line for line in report.log if "hsplit[nvidia]" not in line]
    assert len(warnings) == 1
    assert says in warnings[0]


def test_a_library_with_half_its_functions_answers_with_the_other_half(library, laptop):
    report = ask(library("TRUNCATED"), root=laptop)
    assert report.facts["accelerator"] == "NVIDIA GeForce RTX 4070"
    assert report.telemetry["accelerator_load_percent"] == 87.0
    assert report.telemetry["power_w"] is None
    assert report.telemetry["temperature_c"] == 66.0, "the processor's, for want of the GPU's"
    assert report.gpu_memory_bytes == 6144 * MIB - reserve_bytes(8192 * MIB)
    (line,) = report.log
    for missing in ("clock", "power", "temperature", "throttle reasons", "processes"):
        assert f"{missing} (Function Not Found)" in line


def test_answers_that_make_no_sense_are_no_answers(library, laptop):
    report = ask(library("GARBAGE"), root=laptop)
    assert report.facts["accelerator"] is None
    assert report.facts["accelerator_memory_bytes"] is None
    assert report.facts["driver"] is None
    for field in ("accelerator_load_percent", "accelerator_clock_mhz", "power_w"):
        assert report.telemetry[field] is None
    assert report.telemetry["temperature_c"] == 66.0
    assert report.telemetry["throttled"] is False
    assert report.gpu_memory_bytes is None
    assert len([line for line in report.log if "does not answer as it should" in line]) == 1


def test_a_gpu_that_was_lost_costs_its_own_readings_only(library, laptop):
    report = ask(library("LOST"), root=laptop)
    assert report.facts["accelerator"] is None
    assert report.facts["accelerator_shares_memory"] is False, "it did not say so"
    assert report.gpu_memory_bytes is None
    assert report.host_memory_bytes == HOST_BYTES
    assert any("memory (GPU is lost)" in line for line in report.log)


def test_a_driver_that_hangs_is_asked_no_more(library, laptop):
    report = ask(library("HANGS_LATER"), root=laptop, answer_within_s=0.3, patient_start=False)
    assert report.telemetry["accelerator_load_percent"] is None
    assert report.telemetry["temperature_c"] == 66.0
    assert report.host_memory_bytes == HOST_BYTES
    assert len([line for line in report.log if "no answer within 0.3 s" in line]) == 1
    assert report.left_behind == 1
