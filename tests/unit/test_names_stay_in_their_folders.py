"""Names that reach a file system name one thing in one folder, whoever chose them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import save

from coordinator.settings import CoordinatorSettings
from edge_agent.settings import AgentSettings
from shared import weight_files
from shared.errors import CodecError, ConfigError, ModelError
from shared.protocol import codec, topics
from shared.protocol.message_parts import Device, Module, Piece, Run, Sha256
from tests.support.wire_samples import stored

OUTSIDE = (
    "..", ".", "", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "a/../b", ".hidden",
    "a\0", "a\n", "nano\n", "~", "~root", "%2e%2e", "a b", "-rf", "CON:", "é", "a" * 65,
)  # fmt: skip
NO_GRAPHS = (
    "graph",
    "graph.",
    "graph.a/b",
    "graph./etc",
    "graph.A",
    "graph.a\n",
    "graph." + "a" * 65,
)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", [Device, Run], ids=["device", "run"])
def test_ids_are_refused_as_messages_and_settings_read_them(kind, name):
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(name)


@pytest.mark.parametrize("name", OUTSIDE)
def test_topics_with_such_ids_are_no_topics_of_ours(name):
    assert topics.parse(f"{topics.ROOT}/devices/{name}/requests") is None
    assert topics.parse(f"{topics.ROOT}/runs/{name}/devices/nano/activations") is None
    assert topics.parse(f"{topics.ROOT}/runs/run/devices/{name}/activations") is None


@pytest.mark.parametrize("name", OUTSIDE)
def test_settings_refuse_such_ids(name, tmp_path):
    run, agent = tmp_path / "run.yaml", tmp_path / "agent.yaml"
    run.write_text(json.dumps({"model": {"name": "gpt2"}, "run": {"id": name}}))
    broker = {"url": "mqtt://localhost"}
    agent.write_text(json.dumps({"device_id": name, "broker": broker, "data": "x.jsonl"}))
    with pytest.raises(ConfigError, match="run.id"):
        CoordinatorSettings.load(file=run, environment={})
    with pytest.raises(ConfigError, match="device_id"):
        AgentSettings.load(file=agent, environment={})


@pytest.mark.parametrize("name", ["..", "../../x", "/", "a/../../b", "models/..", "~"])
def test_a_run_id_made_of_a_models_name_is_one_folder(name, tmp_path):
    settings = CoordinatorSettings(model={"name": name}, run={"folder": tmp_path})
    named = settings.with_run_id(0.0)
    assert named.run_folder.resolve().parent == tmp_path.resolve()


@pytest.mark.parametrize(
    "name", [*OUTSIDE, "block.x", "block.12345", "block.1/..", "tokenizer.json", *NO_GRAPHS]
)
def test_pieces_of_other_names_are_no_pieces(name):
    with pytest.raises(ValidationError):
        TypeAdapter(Piece).validate_python({"name": name, "sha256": "0" * 64, "size_bytes": 1})


@pytest.mark.parametrize(
    "digest", [*OUTSIDE, "0" * 63, "0" * 65, "G" * 64, "A" * 64, "../" + "0" * 61, "0" * 64 + "\n"]
)
def test_what_is_stored_by_its_hash_is_stored_under_nothing_else(digest):
    with pytest.raises(ValidationError):
        TypeAdapter(Sha256).validate_python(digest)


@pytest.mark.parametrize("name", ["../x", "a/b", "/", "", "a\0", "a\n", "a-b", "x" * 201])
def test_modules_are_paths_in_a_model_only(name):
    with pytest.raises(ValidationError):
        TypeAdapter(Module).validate_python(name)


@pytest.mark.parametrize(
    ("message", "true", "false"),
    [
        ("welcome", b"20260131-gpt2", b"../60131-gpt2"),
        ("piece_request", b"0123", b"../."),
        ("round_result", b"transformer.", b"transformer/"),
    ],
)
def test_a_message_with_such_a_name_is_refused_whole(message, true, false):
    payload = stored(f"{codec.MAJOR}.{codec.MINOR}", message).read_bytes()
    changed = payload.replace(true, false)
    if changed == payload:
        pytest.fail(f"{message} holds no {true!r}")
    with pytest.raises(CodecError, match="refused at"):
        codec.decode(changed)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "x" * 300, "a\0b"])
def test_an_index_of_weights_points_into_its_own_folder_only(name, tmp_path):
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    data = save({"w": np.ones(3, np.float32)})
    for place in (tmp_path / "secret", folder / "a/b"):
        place.write_bytes(data)
    index = {"weight_map": {"w": name}}
    (folder / weight_files.INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not in the folder"):
        weight_files.weight_files(folder)


@pytest.mark.parametrize("name", ["nano", "Orin-2", "a.b_c", "0"])
def test_ordinary_names_are_taken(name):
    assert TypeAdapter(Device).validate_python(name) == name
    assert topics.parse(f"{topics.ROOT}/devices/{name}/requests").device == name
    assert Path(name).name == name
