"""Recorded kernel files of several machines, and garbage in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from edge_agent.sensors import memory, open_sensors
from edge_agent.sensors.kernel_files import KernelFiles
from edge_agent.sensors.machine import reserve_bytes
from shared.protocol import codec
from shared.protocol.messages import Heartbeat, SessionId
from shared.protocol.profile import DeviceFacts, Telemetry
from tests.support.sysfs_trees import (
    AGX_ORIN,
    AMD_DESKTOP,
    CONTAINER_V1,
    CONTAINER_V2,
    JETSON_IN_A_CONTAINER,
    LAPTOP,
    NANO,
    NESTED_V1,
    ORIN_NANO,
    SERVICE_V2,
    SLICE_V2,
    TREES,
    build,
    cooling,
    meminfo,
    stat,
    zones,
)

MIB = 2**20
PACKAGE_COUNT = "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"


def sensors_of(folder, *trees):
    return open_sensors(root=build(folder, *trees), gpu=None)


# --- Jetsons --------------------------------------------------------------------------------------


def test_a_jetson_orin_nano(tmp_path):
    sensors = sensors_of(tmp_path, ORIN_NANO)
    assert sensors.facts() == DeviceFacts(
        accelerator="NVIDIA Jetson Orin Nano Developer Kit",
        accelerator_shares_memory=True,
        driver="L4T R36.4.3",
        power_mode="MAXN_SUPER",
        memory_bytes=7620 * MIB,
        cpus=6.0,
    )
    build(tmp_path, stat(busy=4300, idle=16100))
    assert sensors.read() == Telemetry(
        accelerator_load_percent=87.3,
        accelerator_clock_mhz=624.75,
        cpu_load_percent=75.0,
        temperature_c=63.875,
        power_w=pytest.approx(4.984 * 1.856),  # the module's input, not that and its parts
        free_memory_bytes=5200 * MIB - reserve_bytes(7620 * MIB),
        used_memory_bytes=700 * MIB,
        throttled=False,
        throttle_reasons=(),
    )


def test_a_jetson_agx_that_is_too_hot(tmp_path):
    sensors = sensors_of(tmp_path, AGX_ORIN)
    facts = sensors.facts()
    assert (facts.accelerator, facts.driver) == ("Jetson AGX Orin Developer Kit", "L4T R35.6.0")
    assert facts.power_mode == "MAXN", "the default, for nobody chose one"
    assert facts.cpus == 4.0, "the others are offline"
    reading = sensors.read()
    assert (reading.accelerator_load_percent, reading.accelerator_clock_mhz) == (14.0, 1300.5)
    assert reading.power_w == pytest.approx(21.0), "the sum of its rails"
    assert reading.temperature_c == 77.3
    assert (reading.throttled, reading.throttle_reasons) == (True, ("gpu-throttle-alert",))


def test_a_jetson_nano_says_less(tmp_path):
    sensors = sensors_of(tmp_path, NANO)
    assert sensors.facts().power_mode == "mode 1"
    reading = sensors.read()
    assert reading.temperature_c == 34.0, "PMIC-Die always says 100"
    assert (reading.accelerator_load_percent, reading.accelerator_clock_mhz) == (0.0, 76.8)
    assert (reading.power_w, reading.throttled) == (None, None)


def test_a_jetson_is_known_inside_a_container(tmp_path):
    sensors = sensors_of(tmp_path, JETSON_IN_A_CONTAINER)
    facts = sensors.facts()
    assert facts.accelerator == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert (facts.accelerator_shares_memory, facts.memory_bytes) == (True, 4096 * MIB)
    limited = (3072 + 500) * MIB - reserve_bytes(4096 * MIB)
    assert sensors.memory_bytes(on_gpu=True) == sensors.memory_bytes(on_gpu=False) == limited


def test_over_current_is_a_reason_but_no_throttling(tmp_path):
    sensors = sensors_of(tmp_path, ORIN_NANO)
    assert sensors.read().throttle_reasons == ()
    build(tmp_path, {"sys/class/hwmon/hwmon2/oc3_event_cnt": "38\n"})
    reading = sensors.read()
    assert (reading.throttled, reading.throttle_reasons) == (False, ("over-current",))
    assert sensors.read().throttle_reasons == (), "that was before"


# --- others ---------------------------------------------------------------------------------------


def test_a_laptop(tmp_path):
    sensors = sensors_of(tmp_path, LAPTOP)
    assert sensors.facts() == DeviceFacts(memory_bytes=15900 * MIB, cpus=8.0)
    reading = sensors.read()
    assert reading.temperature_c == 66.0, "not the wireless card's 81"
    assert (reading.throttled, reading.throttle_reasons) == (False, ())
    assert reading.cpu_load_percent is None, "no time has passed"
    build(tmp_path, {PACKAGE_COUNT: "121\n"}, cooling(("Processor", 3), ("Fan", 1)))
    reading = sensors.read()
    assert (reading.throttled, reading.throttle_reasons) == (True, ("processor heat", "Processor"))


@pytest.mark.parametrize(
    ("found", "temperature_c"),
    [
        ([("PMIC-Die", "100000"), ("AO-therm", "41500")], 41.5),
        ([("cpu-thermal", "-256000")], None),
        ([("cpu-thermal", "52000"), ("acpitz", "90000")], 52.0),
        ([("acpitz", "27800"), ("SEN1", "45050")], 45.05),
        ([], None),
    ],
)
def test_the_hottest_that_means_something_is_the_temperature(tmp_path, found, temperature_c):
    assert sensors_of(tmp_path, zones(*found)).read().temperature_c == temperature_c


def test_a_processor_without_a_thermal_zone_of_its_own(tmp_path):
    assert sensors_of(tmp_path, AMD_DESKTOP).read().temperature_c == 58.25


def test_an_empty_root_says_nothing(tmp_path):
    sensors = sensors_of(tmp_path)
    assert (sensors.facts(), sensors.read()) == (DeviceFacts(), Telemetry())
    assert sensors.memory_bytes(on_gpu=False) is None
    assert sensors.memory_bytes(on_gpu=True) is None


def test_the_load_of_the_cpus_is_that_since_the_last_reading(tmp_path):
    sensors = sensors_of(tmp_path, LAPTOP)
    loads = []
    for busy, idle in ((5100, 5000), (5100, 5000), (5125, 5075), (10, 10), (10, 20)):
        build(tmp_path, stat(busy=busy, idle=idle))
        loads.append(sensors.read().cpu_load_percent)
    assert loads == [100.0, None, 25.0, None, 0.0]


# --- memory and containers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "total_mib", "available_mib", "cpus"),
    [
        (LAPTOP, 15900, 9000, 8.0),
        (CONTAINER_V2, 4096, 4096 - (3072 - 2400), 1.5),
        (SERVICE_V2, 1536, 1536 - 1024, 4.0),
        (SLICE_V2, 1536, 6144 - 5888, 4.0),
        (CONTAINER_V1, 2048, 2048 - (1536 - 768), 2.0),
        (NESTED_V1, 3072, 3072 - 2560, 32.0),
    ],
    ids=["laptop", "container_v2", "service_v2", "slice_v2", "container_v1", "nested_v1"],
)
def test_the_nearest_limit_counts(tmp_path, tree, total_mib, available_mib, cpus):
    sensors = sensors_of(tmp_path, tree)
    facts = sensors.facts()
    assert (facts.memory_bytes, facts.cpus) == (total_mib * MIB, cpus)
    usable = (available_mib + 500) * MIB - reserve_bytes(total_mib * MIB)
    assert sensors.memory_bytes(on_gpu=False) == usable
    assert sensors.read().free_memory_bytes == usable - 500 * MIB


def test_a_wide_limit_does_not_make_a_machine_larger(tmp_path):
    small = meminfo(total_mib=3000, available_mib=300)
    sensors = sensors_of(tmp_path, CONTAINER_V2, small)
    assert sensors.facts().memory_bytes == 3000 * MIB
    assert sensors.memory_bytes(on_gpu=False) == 800 * MIB - reserve_bytes(3000 * MIB)


def test_where_nothing_is_left_it_is_next_to_nothing_and_not_negative(tmp_path):
    sensors = sensors_of(
        tmp_path, meminfo(total_mib=1000, available_mib=5), {"proc/self/status": ""}
    )
    assert sensors.memory_bytes(on_gpu=False) == 1
    assert sensors.read().free_memory_bytes == 0


@pytest.mark.parametrize(
    ("total_mib", "reserve_mib"), [(512, 128), (4000, 200), (8000, 400), (64000, 1024)]
)
def test_the_reserve_is_small_and_never_nothing(total_mib, reserve_mib):
    assert reserve_bytes(total_mib * MIB) == reserve_mib * MIB


# --- this machine ---------------------------------------------------------------------------------


def test_what_this_process_takes_is_its_own():
    files = KernelFiles(Path("/"))
    before, resident = memory.own_bytes(files), memory.resident_bytes(files)
    if not before:
        pytest.skip("this kernel does not tell anonymous memory apart (RssAnon)")
    taken = np.ones(64 * MIB, np.uint8)
    assert memory.own_bytes(files) - before >= 60 * MIB
    assert memory.resident_bytes(files) - resident >= 60 * MIB
    del taken


def test_this_machine_is_no_larger_than_it_is():
    sensors = open_sensors(gpu=None)
    facts = sensors.facts()
    assert facts.memory_bytes <= psutil.virtual_memory().total
    assert 0 < facts.cpus <= len(os.sched_getaffinity(0))
    assert 1 <= sensors.memory_bytes(on_gpu=False) < facts.memory_bytes
    assert sensors.read().used_memory_bytes >= 10 * MIB
    sensors.close()


def test_the_package_loads_neither_pynvml_nor_torch():
    program = "import json, sys; import edge_agent.sensors; print(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, timeout=60
    )
    assert {"pynvml", "torch", "transformers", "psutil"}.isdisjoint(json.loads(done.stdout))


# --- garbage --------------------------------------------------------------------------------------

GARBAGE = st.one_of(
    st.sampled_from(
        ["", "-1", "0", "nan", "inf", "max", "1e400", "9" * 19, "9" * 400, "-" + "9" * 19, "\0"]
    ).map(str.encode),
    st.integers(-(2**64), 2**64).map(lambda number: str(number).encode()),
    st.binary(max_size=64),
    st.text(max_size=64).map(lambda text: text.encode(errors="surrogatepass")),
    st.sampled_from(["folder", "pipe", "loop", "secret"]),
)


def spoil(file, garbage):
    if isinstance(garbage, bytes):
        file.write_bytes(garbage)
        return
    file.unlink()
    if garbage == "folder":
        file.mkdir()
    elif garbage == "pipe":
        os.mkfifo(file)
    elif garbage == "loop":
        file.symlink_to(file)
    else:
        file.touch(mode=0)


def assert_fit_for_a_message(sensors):
    beat = Heartbeat(session=SessionId("0" * 16), telemetry=sensors.read())
    assert codec.decode(codec.encode(beat)) == beat
    facts, in_messages = sensors.facts(), TypeAdapter(DeviceFacts)
    assert in_messages.validate_json(in_messages.dump_json(facts)) == facts
    for on_gpu in (True, False):
        usable = sensors.memory_bytes(on_gpu=on_gpu)
        assert usable is None or 1 <= usable < 2**63


@settings(deadline=None, max_examples=60)
@given(machine=st.sampled_from(sorted(TREES)), data=st.data())
def test_whatever_stands_in_the_files_nothing_is_raised(machine, data):
    tree = TREES[machine]
    spoilt = data.draw(st.sets(st.sampled_from(sorted(tree)), min_size=1))
    with tempfile.TemporaryDirectory() as folder:
        root = build(Path(folder), tree)
        for path in sorted(spoilt):
            spoil(root / path, data.draw(GARBAGE))
        sensors = open_sensors(root=root, gpu=None)
        assert_fit_for_a_message(sensors)
        for path in sorted(spoilt):
            if (root / path).is_file():
                (root / path).write_bytes(b"12345678901234567")
        assert_fit_for_a_message(sensors)


@settings(deadline=None, max_examples=50)
@given(text=st.binary(max_size=200))
def test_wherever_a_process_seems_to_be_the_containers_own_limit_holds(text):
    with tempfile.TemporaryDirectory() as folder:
        root = build(Path(folder), CONTAINER_V2)
        (root / "proc/self/cgroup").write_bytes(b"0::/" + text)
        sensors = open_sensors(root=root, gpu=None)
        assert sensors.facts().memory_bytes == 4096 * MIB


def test_any_threads_may_read_at_once(tmp_path):
    sensors = sensors_of(tmp_path, ORIN_NANO)
    with ThreadPoolExecutor(8) as pool:
        readings = list(pool.map(lambda _: sensors.read(), range(64)))
    assert {reading.accelerator_load_percent for reading in readings} == {87.3}
