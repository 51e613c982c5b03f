"""What people and programs are shown of a device."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edge_agent import profile_report
from edge_agent.profile_command import Found, Measured
from edge_agent.profile_report import as_json, as_table, rate, seconds, size
from shared import profile_file
from shared.protocol.profile import (
    BlockPoint,
    DeviceFacts,
    HeadPoint,
    LinkMeasurement,
    Measurements,
    OptimizerPoint,
    ProfileFile,
    Telemetry,
)
from tests.support.wire_samples import SAMPLES

MIB = 2**20
LINK = LinkMeasurement(uplink_bytes_per_s=2.5e6, downlink_bytes_per_s=1e7, round_trip_s=0.0125)


def point(blocks: int, sequences: int, **changes: object) -> BlockPoint:
    """Return what a device gives that takes exactly so long and so much."""
    tokens = sequences * 128
    exact = BlockPoint(
        blocks=blocks,
        adapter_parameters=1000 * blocks,
        sequences=sequences,
        length=128,
        forward_s=tokens * (10e-6 + blocks * 4e-6),
        backward_s=tokens * (20e-6 + blocks * 9e-6),
        spread=0.25,
        peak_bytes=400 * MIB + 8000 * blocks + blocks * (6 * MIB + tokens * MIB // 128),
    )
    return dataclasses.replace(exact, **changes)


MEASUREMENTS = Measurements(
    hsplit_version="0.1.0",
    backend="torch",
    dtype="float32",
    threads=2,
    model="0" * 64,
    runtime_bytes=300 * MIB,
    memory_bytes=4096 * MIB,
    blocks=(point(1, 1), point(1, 4), point(3, 1), point(3, 4)),
    head=(
        HeadPoint(tokens=128, seconds=0.032, spread=0.5, extra_bytes=MIB),
        HeadPoint(tokens=512, seconds=0.128, spread=0.125, extra_bytes=4 * MIB),
    ),
    optimizer=(
        OptimizerPoint(adapter_parameters=1000, seconds=0.0005),
        OptimizerPoint(adapter_parameters=3000, seconds=0.0015),
    ),
    link=LINK,
)
FACTS_ONLY = Found(
    device_id="nano",
    machine="aarch64 Linux",
    facts=SAMPLES["join_request"].profile.facts,
    telemetry=SAMPLES["heartbeat"].telemetry,
    memory_bytes=4096 * MIB,
)


def found(measurements: Measurements = MEASUREMENTS) -> Found:
    profile = ProfileFile(
        device_id="nano",
        machine="aarch64 Linux",
        facts=FACTS_ONLY.facts,
        measurements=measurements,
    )
    measured = Measured(
        model="tiny",
        blocks=6,
        computes_on="Orin",
        micro_batch=4,
        length=128,
        profile=profile,
    )
    return dataclasses.replace(FACTS_ONLY, link=measurements.link, measured=measured)


def rows(table: str) -> dict[str, list[str]]:
    """Return the cells of each line of the table by its first words."""
    split = [line.strip().split("  ") for line in table.splitlines() if line.strip()]
    return {cells[0].strip(): [one.strip() for one in cells[1:] if one.strip()] for cells in split}


def test_the_table_has_the_seconds_of_a_block_and_of_what_stands_beside_them():
    told = rows(as_table(found()))
    assert told["each block"] == ["2.05 ms", "4.61 ms", "25 %"]
    assert told["beside them"] == ["5.12 ms", "10.2 ms"]
    assert told["head"] == ["128 ms", "with it", "50 %"]
    assert told["step, 1 block"] == ["0.5 ms"]


def test_the_table_has_the_line_of_memory_and_the_link():
    table = as_table(found())
    assert "400 MiB + 10 MiB per block at micro-batch 4 x 128 tokens; 4 GiB may be used" in table
    assert "up 2.5 MB/s (20 Mbit/s), down 10 MB/s (80 Mbit/s), round trip 12.5 ms" in table


def test_the_table_says_what_was_measured_with_what():
    table = as_table(found())
    assert "tiny, 6 blocks" in table
    assert "torch on Orin, float32, CPU threads: 2" in table
    assert "micro-batches of 4 x 128 tokens" in table
    assert profile_report.BUSY not in table
    assert "name a model" not in table


def test_the_table_says_what_the_machine_is_and_how_it_is():
    table = as_table(FACTS_ONLY)
    assert (
        "nano        aarch64 Linux, 6 CPUs, 8 GiB of memory, power mode 15W, Orin with 8 GiB, "
        "in the machine's memory, driver 540.4.0"
    ) in table
    assert "CPU at 12 %, GPU at 87 %, 72 °C, 14.2 W, 1 GiB free, throttled (too hot)" in table


def test_where_no_sensor_says_anything_the_table_says_so():
    bare = Found(device_id="x", machine="y", facts=DeviceFacts(), telemetry=Telemetry())
    table = as_table(bare)
    assert "y, no GPU found" in table
    assert "no sensor says" in table
    assert "None" not in table


def test_what_was_not_measured_comes_with_how_to_measure_it():
    table = as_table(FACTS_ONLY)
    assert table.endswith("\n".join(profile_report.MORE))
    with_link = as_table(dataclasses.replace(FACTS_ONLY, link=LINK))
    assert "--model" in with_link
    assert "--broker" not in with_link


def test_a_device_that_was_busy_is_told_to_measure_again():
    busy = dataclasses.replace(
        MEASUREMENTS, blocks=tuple(point(b, s, spread=1.5) for b in (1, 3) for s in (1, 4))
    )
    assert profile_report.BUSY in as_table(found(busy))


def test_a_device_without_a_head_has_no_line_for_one():
    told = rows(as_table(found(dataclasses.replace(MEASUREMENTS, head=(), optimizer=()))))
    assert {"head", "step, 1 block"}.isdisjoint(told)


def test_the_json_of_a_profile_is_the_file_of_one(tmp_path):
    path = tmp_path / "nano.json"
    path.write_text(as_json(found()))
    assert profile_file.read(path).measurements == MEASUREMENTS


def test_the_json_of_a_device_without_a_model_has_what_there_is():
    value = json.loads(as_json(dataclasses.replace(FACTS_ONLY, link=LINK)))
    assert value["device_id"] == "nano"
    assert value["facts"]["accelerator"] == "Orin"
    assert value["telemetry"]["throttle_reasons"] == ["too hot"]
    assert value["memory_bytes"] == 4096 * MIB
    assert value["link"]["round_trip_s"] == 0.0125
    assert "measured" not in value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds(2.5), "2.5 s"),
        (seconds(123.4), "123 s"),
        (seconds(0.01234), "12.3 ms"),
        (seconds(4e-6), "0.004 ms"),
        (size(300 * MIB), "300 MiB"),
        (size(7.5 * 2**30), "7.5 GiB"),
        (size(123.4 * 2**30), "123 GiB"),
        (rate(1.25e6), "1.25 MB/s (10 Mbit/s)"),
        (rate(2e8), "200 MB/s (1600 Mbit/s)"),
        (rate(1e9), "1000 MB/s or more"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(text, expected):
    assert text == expected
