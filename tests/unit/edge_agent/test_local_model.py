"""Models on disk, in every form that the hub has them in, as pieces that the backend loads."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_agent.local_model import open_model
from shared.errors import ConfigError, ModelError, StorageError
from tests.support.tiny_models import FAMILIES, TinyModel, tiny_classifier, tiny_model


def write(folder: Path, model: TinyModel, *, shards: int = 1, without_prefix: str = "") -> Path:
    """Write a checkpoint as the hub would hold it, its tensors dealt out to ``shards`` files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    tensors = {
        name.removeprefix(without_prefix): tensor.clone() for name, tensor in model.tensors.items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    file_of = {
        name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors"
        for number, name in enumerate(tensors)
    }
    for file in sorted(set(file_of.values())):
        save_file({n: t for n, t in tensors.items() if file_of[n] == file}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": file_of})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def pieces(folder: Path, scratch: Path, *, blocks: int = 2) -> Mapping[str, Path]:
    model = open_model(str(folder))
    names = model.architecture.front_pieces(blocks, head_on_device=True)
    return model.piece_files(names, scratch=scratch)


def assert_holds(files: Mapping[str, Path], model: TinyModel, *, blocks: int) -> None:
    names = model.architecture.front_pieces(blocks, head_on_device=True)
    assert list(files) == list(names)
    for name, tensor in model.tensors.items():
        piece = model.architecture.piece_of(name)
        if piece in names:
            assert torch.equal(load_file(files[piece])[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_used_as_it_is(tmp_path, family):
    model = tiny_model(family)
    folder = write(tmp_path / "base", model)
    files = pieces(folder, tmp_path)
    assert_holds(files, model, blocks=2)
    assert set(files.values()) == {folder / "model.safetensors"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_piece_that_lies_in_several_files_is_put_together(tmp_path, family):
    model = tiny_model(family)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    files = pieces(write(tmp_path / "base", model, shards=3), scratch)
    assert_holds(files, model, blocks=2)
    assert files["block.0"].parent == scratch


def test_an_encoder_is_measured_as_a_classifier(tmp_path):
    folder = write(tmp_path / "base", tiny_classifier("bert"), without_prefix="bert.")
    architecture = open_model(str(folder)).architecture
    assert (architecture.task, architecture.class_count) == ("classification", 2)
    assert architecture.front_pieces(1, head_on_device=True) == ("embeddings", "block.0", "head")


def test_names_without_the_first_part_are_completed(tmp_path):
    """GPT-2's own checkpoints on the hub are so."""
    model = tiny_model("gpt2")
    folder = write(tmp_path / "base", model, without_prefix="transformer.")
    assert_holds(pieces(folder, tmp_path), model, blocks=2)


def test_only_files_with_wanted_tensors_need_to_be_there(tmp_path):
    model = tiny_model("llama")
    folder = write(tmp_path / "base", model)
    whole = load_file(folder / "model.safetensors")
    last = {name: t for name, t in whole.items() if ".layers.2." in name}
    save_file({n: t for n, t in whole.items() if n not in last}, folder / "first.safetensors")
    file_of = {n: "last.safetensors" if n in last else "first.safetensors" for n in whole}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    assert_holds(pieces(folder, tmp_path), model, blocks=2)
    with pytest.raises(ModelError, match="last.safetensors"):
        pieces(folder, tmp_path, blocks=3)


def test_a_model_is_called_by_its_folder(tmp_path, monkeypatch):
    write(tmp_path / "my-base", tiny_model("gpt2"))
    monkeypatch.chdir(tmp_path / "my-base")
    assert open_model(".").name == "my-base"


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named():
    for name in ("./none", "/none/at/all", "a/b/c"):
        with pytest.raises(ModelError, match=f"model {name}: no such folder; check --model"):
            open_model(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="config.json is missing; is this a Hugging Face model"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "opt"}', "'opt' are not supported"),
        ('{"model_type": "gpt2"}', "config.json: hidden_size / n_embd must be"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=reason):
        open_model(str(tmp_path))


def test_missing_weights_are_named(tmp_path):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    whole = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in whole.items() if ".h.1." not in n}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"the weights lack piece block\.1"):
        pieces(folder, tmp_path)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="is damaged"):
        pieces(folder, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model.safetensors"):
        pieces(folder, tmp_path)


def test_a_scratch_folder_that_cannot_be_written_is_named(tmp_path):
    folder = write(tmp_path / "base", tiny_model("gpt2"), shards=3)
    with pytest.raises(StorageError, match="cannot be written: No such file.*cache_folder"):
        pieces(folder, tmp_path / "none")


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not in the hub's cache.*check --model, or give a folder"):
        open_model("nobody/no-such-model")
    with pytest.raises(ModelError, match="neither a folder here nor a possible hub name"):
        open_model("what is this?")


def test_without_the_hubs_library_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface-hub, or give a folder"):
        open_model("openai-community/gpt2")


def test_a_model_in_the_hubs_cache_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    model = tiny_model("qwen3")
    write(cached / "snapshots" / commit, model, shards=2)
    found = open_model("org/tiny")
    assert found.name == "org/tiny"
    names = model.architecture.front_pieces(1, head_on_device=True)
    assert_holds(found.piece_files(names, scratch=tmp_path), model, blocks=1)
