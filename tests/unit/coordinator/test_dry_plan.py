"""``hsplit-coordinator plan`` from files: what it prints, and what it will not read."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from coordinator.dry_plan import plan
from coordinator.planning.plan_report import as_data, as_table
from coordinator.settings import CoordinatorSettings
from shared import profile_file
from shared.architecture import ModelArchitecture
from shared.clock import SystemClock
from shared.errors import ConfigError, PlanError
from shared.protocol.profile import ProfileFile
from tests.support.fleets import SHAPE, Machine
from tests.support.simulation import write_model
from tests.testbed.in_process import coordinator_main


def command(*arguments):
    return coordinator_main("plan", *map(str, arguments))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture
def write(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    architecture = ModelArchitecture.from_config(config)

    def write(name, machine, **changes):
        path = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}.json"
        measured = dataclasses.replace(machine.measured(architecture), **changes)
        profile = ProfileFile(device_id=name, data=SHAPE, measurements=measured)
        profile_file.write(path, profile)
        return path

    return write


@pytest.fixture
def run_file(model, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name: {model}}}\ntraining: {{max_length: 64}}\nplan: {{batch: 4}}\n")
    return path


def planned(run_file, profiles, server):
    settings = CoordinatorSettings.load(file=run_file, environment={})
    return plan(settings, profiles, server_profile=server, clock=SystemClock())


def test_a_plan_from_files_says_who_does_what_and_why(run_file, write):
    profiles = [write("fast", Machine()), write("slow", Machine(speed=0.2, uplink=1e6))]
    done = command(run_file, *profiles, "--server-profile", write("s", Machine()))
    assert done.code == 0
    assert re.search(r"^device +k +rank +batch", done.output)
    assert re.search(r"^fast +\d.* k = \d", done.output, re.MULTILINE)
    assert re.search(r"predicted: [\d.]+ s a step of 8 sequences; the server is busy", done.output)


def test_for_programs_it_is_json(run_file, write):
    server = write("server", Machine())
    done = command(run_file, write("fast", Machine()), "--server-profile", server, "--json")
    data = json.loads(done.output)
    assert data["sequences"] == 4
    assert data["devices"]["fast"]["plan"]["batch"] == 4
    assert data["devices"]["fast"]["predicted"]["own_s"] > 0
    assert data["devices"]["fast"]["reason"]["text"].startswith("k = ")


def test_a_device_that_cannot_take_part_is_named_in_table_and_data(run_file, write):
    tight = write("tight", Machine(memory_bytes=100 * 2**20))
    found = planned(run_file, [write("fast", Machine()), tight], write("s", Machine()))
    assert "refused: tight may use 100 MiB" in as_table(found)
    assert "tight may use 100 MiB" in as_data(found)["refused"]["tight"]
    with pytest.raises(PlanError, match="no device can take part: tight"):
        planned(run_file, [tight], write("s", Machine()))
    failed = command(run_file, tight, "--server-profile", write("s", Machine()))
    assert failed.code == PlanError.exit_code


def test_what_is_not_known_is_not_made_up(run_file, write):
    found = planned(run_file, [write("fast", Machine())], write("s", Machine()))
    unknown = dataclasses.replace(
        found, prediction=dataclasses.replace(found.prediction, devices={})
    )
    assert re.search(r"^fast .*\? +\? +\?", as_table(unknown), re.MULTILINE)
    assert as_data(unknown)["devices"]["fast"]["predicted"] is None


@pytest.mark.parametrize("flags", [(), ("--measure-server",)])
def test_without_a_servers_profile_this_machine_measures_itself(
    run_file, write, tmp_path, monkeypatch, flags
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = command(run_file, write("slow", Machine(speed=0.01)), *flags, "--json")
    data = json.loads(done.output)
    assert data["server_s"] > 0
    assert data["devices"]["slow"]["predicted"]["server_s"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "0" * 64}, r"bad-\d+\.json \(bad\) is of another model than .*measure again"),
        ({"dtype": "bfloat16"}, r"bad-\d+\.json \(bad\) was measured in bfloat16"),
        ({"version": 99}, r"bad-\d+\.json is of version 99"),
    ],
)
def test_a_profile_of_something_else_is_refused_by_file(run_file, write, change, words):
    good, bad = write("good", Machine()), write("bad", Machine(), **change)
    with pytest.raises(ConfigError, match=words):
        planned(run_file, [good, bad], good)
    with pytest.raises(ConfigError, match=words):
        planned(run_file, [good], bad)


def test_two_profiles_of_one_device_are_refused_with_both_names(run_file, write):
    one, two = write("nano", Machine()), write("nano", Machine(speed=2.0))
    with pytest.raises(ConfigError, match=f"{one} and {two} are both of device nano"):
        planned(run_file, [one, two], one)


def test_a_run_that_is_longer_than_the_model_allows_is_refused(run_file, write):
    run_file.write_text(run_file.read_text().replace("max_length: 64", "max_length: 100000"))
    profile = write("fast", Machine())
    with pytest.raises(PlanError, match="training.max_length is 100000"):
        planned(run_file, [profile], profile)
