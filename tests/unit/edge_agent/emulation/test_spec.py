"""What ``--emulate`` takes, and what it says of what it does not take."""

from __future__ import annotations

import pytest

from edge_agent.emulation import EXAMPLE, Emulation, parse_emulation
from edge_agent.settings import AgentSettings
from shared.config import Flag
from shared.errors import ConfigError

BROKER = {"HSPLIT_BROKER__URL": "mqtt://localhost", "HSPLIT_DEVICE_ID": "nano", "HSPLIT_DATA": "x"}


def test_the_example_says_what_it_means():
    assert parse_emulation(EXAMPLE) == Emulation(
        memory_bytes=2 * 2**30,
        speed=0.25,
        uplink_bytes_per_s=1_250_000,
        downlink_bytes_per_s=6_250_000,
        latency_s=0.02,
    )


@pytest.mark.parametrize(
    ("rate", "bytes_per_s"),
    [
        ("800bit/s", 100),
        ("8kbit/s", 1000),
        ("0.5Mbit/s", 62_500),
        ("1 Gbit/s", 125e6),
        ("7B/s", 7),
        ("1kB/s", 1000),
        ("1.5MB/s", 1.5e6),
        ("2GB/s", 2e9),
        ("1KiB/s", 1024),
        ("2MiB/s", 2 * 2**20),
        ("1GiB/s", 2**30),
    ],
)
def test_rates_have_units(rate: str, bytes_per_s: float):
    found = parse_emulation(f"uplink={rate}, downlink={rate}")
    assert found.uplink_bytes_per_s == pytest.approx(bytes_per_s)
    assert found.downlink_bytes_per_s == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(("latency", "seconds"), [("20ms", 0.02), ("1.5s", 1.5), ("0ms", 0)])
def test_a_latency_has_a_unit(latency: str, seconds: float):
    assert parse_emulation(f"latency={latency}").latency_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [("speed=0.5,memory=1GiB", False), ("latency=0s", False), ("latency=1ms", True)]
    + [(f"{way}=1Mbit/s", True) for way in ("uplink", "downlink")],
)
def test_only_a_link_that_is_named_is_shaped(text: str, *, shapes: bool):
    assert parse_emulation(text).shapes_link is shapes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("speed=0", "speed=0: choose a number above 0 up to 1"),
        ("speed=1.5", "speed=1.5: choose a number above 0 up to 1"),
        ("speed=nan", "speed=nan: choose a number above 0 up to 1"),
        ("speed=fast", "speed=fast: choose a number above 0 up to 1"),
        ("speed=-1", "speed=-1: choose"),
        ("memory=2", "memory=2: choose a size of at least 1 MiB, such as 2GiB"),
        ("memory=much", "memory=much: choose a size"),
        ("memory=-2GiB", "memory=-2GiB: choose a size"),
        ("uplink=10", "uplink=10: choose a number and one of these units: bit/s, kbit/s"),
        ("uplink=10Mb/s", "uplink=10Mb/s: choose a number and one of these units"),
        ("downlink=0bit/s", "downlink=0bit/s: choose a rate above 0"),
        (f"downlink={'9' * 400}bit/s", "choose a rate above 0"),
        ("latency=20", "latency=20: choose a number and one of these units: ms, s"),
        ("latency=2min", "latency=2min: choose a number and one of these units: ms, s"),
        ("latency=90s", "latency=90s: choose at most 60s"),
        ("speed=1,speed=0.5", "speed is given twice"),
        ("ram=2GiB", "'ram=2GiB' is no part of it: choose of memory, speed, uplink"),
        ("speed", "'speed' is no part of it"),
        ("", "'' is no part of it"),
        ("speed=0.5,", "'' is no part of it"),
    ],
)
def test_the_part_that_is_wrong_is_named(text: str, complaint: str):
    with pytest.raises(ConfigError) as caught:
        parse_emulation(text)
    assert complaint in str(caught.value)


def test_the_flag_and_the_variable_are_named():
    with pytest.raises(ConfigError, match=r"emulate \(--emulate\): speed=0: choose"):
        AgentSettings.load(environment=BROKER, flags=[Flag("--emulate", "emulate", "speed=0")])
    with pytest.raises(ConfigError, match=r"emulate \(HSPLIT_EMULATE\): uplink=1: choose"):
        AgentSettings.load(environment={**BROKER, "HSPLIT_EMULATE": "uplink=1"})


def test_settings_hold_it_and_can_be_written_and_read_again():
    settings = AgentSettings.load(environment={**BROKER, "HSPLIT_EMULATE": EXAMPLE})
    assert settings.emulation == parse_emulation(EXAMPLE)
    assert settings.resolved()["emulate"] == EXAMPLE
    assert AgentSettings.load(environment=BROKER).emulation is None


@pytest.mark.parametrize(
    ("limit", "emulate", "least"),
    [
        (None, None, None),
        ("3GiB", None, 3),
        (None, "memory=2GiB", 2),
        ("3GiB", "memory=2GiB", 2),
        ("1GiB", "memory=2GiB", 1),
        ("1GiB", "speed=0.5", 1),
    ],
)
def test_the_smaller_memory_counts(limit: str | None, emulate: str | None, least: int | None):
    flags = [Flag("--memory-limit", "memory_limit", limit), Flag("--emulate", "emulate", emulate)]
    settings = AgentSettings.load(environment=BROKER, flags=flags)
    assert settings.least_memory == (None if least is None else least * 2**30)


def test_it_is_said_in_one_line():
    assert str(parse_emulation(EXAMPLE)) == (
        "2048 MiB of memory, 0.25 of this machine's speed, 10 Mbit/s up, 50 Mbit/s down, "
        "20 ms of latency each way"
    )
