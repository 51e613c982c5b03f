"""Adapters that can be opened, and what is said of those that cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from coordinator import demo
from coordinator.evaluation.opening import CONFIG, find_adapter, open_adapted
from coordinator.export import WEIGHTS
from shared.errors import ConfigError, ModelError
from tests.support import exported_adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return exported_adapters.write_adapter(tmp_path_factory.mktemp("adapter") / "adapter")


def changed(adapter: Path, folder: Path, **config: Any) -> Path:
    """Return a copy of an adapter with another configuration."""
    shutil.copytree(adapter, folder)
    known = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**known, **config}))
    return folder


def test_an_adapter_is_opened_on_the_base_that_it_names(adapter):
    opened = open_adapted(find_adapter(adapter), device="cpu")
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours, plain = opened.model(tokens).logits, exported_adapters.opened_with_peft(adapter)
        assert torch.equal(ours, plain(tokens).logits)
    assert (opened.positions, opened.max_length, opened.eos_token_id) == (512, 512, 0)


def test_a_run_folders_adapter_is_measured_on_sequences_of_the_runs_length(tmp_path):
    run = exported_adapters.write_run(tmp_path / "run", max_length=77)
    found = find_adapter(run)
    assert found.path == run / "adapter"
    assert open_adapted(found, device="cpu").max_length == 77
    assert open_adapted(found, device="cpu", max_length=9).max_length == 9
    assert open_adapted(found, device="cpu", max_length=9999).max_length == 512


def test_a_run_without_an_adapter_says_how_to_get_one(tmp_path):
    run = exported_adapters.write_run(tmp_path / "run")
    shutil.rmtree(run / "adapter")
    with pytest.raises(ModelError, match=f"hsplit-coordinator export {run}$"):
        find_adapter(run)


def test_what_is_no_adapter_is_said(adapter, tmp_path):
    with pytest.raises(ModelError, match="no such folder; give a PEFT adapter's or a run's"):
        find_adapter(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=f"no adapter, {CONFIG} is missing"):
        find_adapter(tmp_path)
    without_weights = changed(adapter, tmp_path / "pickled")
    (without_weights / WEIGHTS).rename(without_weights / "adapter_model.bin")
    with pytest.raises(ModelError, match=f"{WEIGHTS} is missing"):
        find_adapter(without_weights)
    broken = changed(adapter, tmp_path / "broken")
    (broken / CONFIG).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        find_adapter(broken)


def test_adapters_that_write_no_text_are_refused(adapter, tmp_path):
    with pytest.raises(ModelError, match="an adapter for SEQ_CLS"):
        find_adapter(changed(adapter, tmp_path / "one", task_type="SEQ_CLS"))
    with pytest.raises(ModelError, match="not a LoRA adapter"):
        find_adapter(changed(adapter, tmp_path / "other", peft_type="PROMPT_TUNING"))


def test_a_base_that_is_not_here_is_named_with_the_flag_that_gives_another(adapter, tmp_path):
    moved = changed(adapter, tmp_path / "moved", base_model_name_or_path="/no/such/base")
    with pytest.raises(ModelError, match=r"names is not here; give it with --model .*such/base"):
        open_adapted(find_adapter(moved))
    assert open_adapted(find_adapter(moved), base=str(demo.base_folder()), device="cpu")
    with pytest.raises(ModelError, match="model /no/other: no such folder; check --model"):
        open_adapted(find_adapter(moved), base="/no/other")
    nameless = changed(adapter, tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model; give it with --model"):
        open_adapted(find_adapter(nameless))


def test_a_base_that_the_adapter_does_not_fit_is_refused(adapter, tmp_path):
    other = tmp_path / "other"
    config = GPT2Config(n_layer=6, n_embd=32, n_head=2, vocab_size=4096, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(other)
    shutil.copy(demo.base_folder() / "tokenizer.json", other)
    with pytest.raises(ModelError, match=r"does not fit base model .*was it trained on another"):
        open_adapted(find_adapter(adapter), base=str(other), device="cpu")


def test_an_adapter_with_a_missing_or_a_foreign_tensor_is_refused(adapter, tmp_path):
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    for folder, kept in (
        (tmp_path / "less", {k: t for k, t in tensors.items() if k != name}),
        (tmp_path / "more", {**tensors, name.replace("h.0.", "h.9."): tensors[name].clone()}),
    ):
        save_file(kept, changed(adapter, folder) / WEIGHTS)
        with pytest.raises(ModelError, match="does not fit base model"):
            open_adapted(find_adapter(folder), device="cpu")


def test_a_damaged_base_and_an_absent_device_are_said(adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(demo.base_folder(), base)
    (base / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_adapted(find_adapter(adapter), base=str(base), device="cpu")
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*model\.safetensors"):
        open_adapted(find_adapter(adapter), base=str(base), device="cpu")
    with pytest.raises(ConfigError, match="device cuda:99 is not there"):
        open_adapted(find_adapter(adapter), device="cuda:99")
