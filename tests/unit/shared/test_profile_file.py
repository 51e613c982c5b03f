"""Profiles in files: what was written is read again, and nothing else is taken for a profile."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings

from shared import profile_file
from shared.errors import ConfigError, StorageError
from shared.protocol.profile import PROFILE_VERSION, DataShape, ProfileFile
from tests.support.wire_messages import of_type
from tests.support.wire_samples import MEASUREMENTS, SAMPLES

PROFILE = ProfileFile(
    device_id="nano",
    machine="aarch64 Linux",
    facts=SAMPLES["join_request"].profile.facts,
    data=DataShape(mean_length=48.5, padded_length=60.25, longest=64),
    measurements=MEASUREMENTS,
)


def of_this_version(profile: ProfileFile) -> ProfileFile:
    measurements = dataclasses.replace(profile.measurements, version=PROFILE_VERSION)
    return dataclasses.replace(profile, measurements=measurements)


def written(path, **changes):
    """Write the profile as a file with these fields of its measurements changed."""
    value = json.loads(profile_file.to_json(PROFILE))
    value["measurements"].update(changes)
    path.write_text(json.dumps(value))
    return path


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(profile=of_type(ProfileFile).map(of_this_version))
def test_what_was_written_is_read_again(tmp_path, profile):
    path = tmp_path / "profile.json"
    profile_file.write(path, profile)
    assert profile_file.read(path) == profile


def test_it_is_json_that_leaves_out_what_is_not_known():
    bare = dataclasses.replace(
        PROFILE, data=None, measurements=dataclasses.replace(MEASUREMENTS, link=None)
    )
    value = json.loads(profile_file.to_json(bare))
    assert value["device_id"] == "nano"
    assert value["measurements"]["blocks"][0]["forward_s"] == 0.0625
    assert "data" not in value
    assert "link" not in value["measurements"]


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf"), "fast", None])
def test_nonsense_measurements_are_refused_by_name(tmp_path, value):
    blocks = json.loads(profile_file.to_json(PROFILE))["measurements"]["blocks"]
    blocks[1]["backward_s"] = value
    path = written(tmp_path / "orin.json", blocks=blocks)
    with pytest.raises(
        ConfigError, match=r"orin\.json: measurements\.blocks\.1\.backward_s.*again"
    ):
        profile_file.read(path)


def test_a_profile_of_another_version_is_refused_with_both(tmp_path):
    path = written(tmp_path / "new.json", version=PROFILE_VERSION + 1)
    expected = f"is of version {PROFILE_VERSION + 1}, this program reads {PROFILE_VERSION}; measure"
    with pytest.raises(ConfigError, match=expected):
        profile_file.read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b'{"device_id": ', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "should be|must be|dataclass"),
        (b'{"device_id": "nano"}', "measurements: Field required"),
        (b" " * (profile_file.MOST_BYTES + 1), "larger than any profile"),
    ],
    ids=["empty", "cut off", "binary", "deep", "list", "facts only", "huge"],
)
def test_what_is_no_profile_is_refused_with_what_to_do(tmp_path, content, reason):
    path = tmp_path / "none.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s)none\.json.*({reason}).*measure again") as refused:
        profile_file.read(path)
    assert len(str(refused.value)) < 500


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file"):
        profile_file.read(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        profile_file.read(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/profile\.json cannot be written"):
        profile_file.write(tmp_path / "file" / "profile.json", PROFILE)
