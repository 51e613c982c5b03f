"""Blocks in 8 bits in the model store: computed once, served small, read as devices read them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coordinator.model_store import ModelStore
from shared.errors import ModelError, PlanError
from shared.int8_weights import SCALE, VALUES, int8_names, quantise
from shared.terms import TrainingChoices
from tests.support.int8_models import plain_model
from tests.support.simulation import write_model

FAMILIES = ("gpt2", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, write_model(
        tmp_path_factory.mktemp(request.param) / "base", request.param
    )


def open_store(base: Path, cache: Path, *, blocks: int) -> ModelStore:
    training = TrainingChoices(int8_blocks=blocks)
    return ModelStore.open(str(base), cache_folder=cache, training=training)


def piece(store: ModelStore, name: str, folder: Path) -> dict[str, torch.Tensor]:
    (found,) = (one for one in store.describe().pieces if one.name == name)
    content = store.read(found.sha256, offset=0, length=found.size_bytes)
    (folder / name).write_bytes(content)
    return load_file(folder / name)


def test_a_piece_holds_the_linear_weights_in_8_bits_and_the_rest_as_it_was(base, tmp_path):
    family, folder = base
    store = open_store(folder, tmp_path, blocks=2)
    names = set(int8_names(store.architecture, 2))
    plain = plain_model(family).tensors
    for block in (0, 1):
        held = piece(store, f"block.{block}", tmp_path)
        own = {n for n in plain if store.architecture.piece_of(n) == f"block.{block}"}
        expected = {n + end for n in own & names for end in (VALUES, SCALE)} | (own - names)
        assert held.keys() == expected
        assert {held[n + VALUES].dtype for n in own & names} == {torch.int8}
        for name in own - names:
            assert torch.equal(held[name], plain[name])
    last = piece(store, "block.2", tmp_path)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in last.items())


def test_the_coordinator_reads_the_products_of_what_it_serves(base, tmp_path):
    family, folder = base
    store = open_store(folder, tmp_path, blocks=2)
    tensors, plain = store.tensors(), plain_model(family).tensors
    names = int8_names(store.architecture, 2)
    first = store.architecture.family.inputs_first
    for name in names:
        expected = quantise(plain[name].numpy(), inputs_first=first).dequantised()
        np.testing.assert_array_equal(tensors[name].numpy(), expected)
    assert (
        len(tensors)
        == len(set(tensors))
        == len(set(open_store(folder, tmp_path, blocks=0).tensors()))
    )
    assert not any(name.endswith((VALUES, SCALE)) for name in tensors)
    with pytest.raises(KeyError):
        tensors[names[0] + VALUES]


def test_a_block_is_a_quarter_to_fetch(tmp_path):
    base = write_model(tmp_path / "base", "gpt2")
    sizes = [
        {one.name: one.size_bytes for one in store.describe().pieces}
        for store in (open_store(base, tmp_path, blocks=n) for n in (0, 1))
    ]
    weights = sum(
        i * o for i, o in open_store(base, tmp_path, blocks=0).architecture.linears.values()
    )
    saved = sizes[0]["block.0"] - sizes[1]["block.0"]
    assert 0.9 * 3 * weights < saved < 3 * weights
    assert sizes[0]["block.1"] == sizes[1]["block.1"]


def test_it_is_computed_once(base, tmp_path, caplog):
    _, folder = base
    with caplog.at_level(logging.INFO):
        first = open_store(folder, tmp_path, blocks=2)
        assert caplog.text.count("quantising") == 2
        caplog.clear()
        second = open_store(folder, tmp_path, blocks=2)
        third = open_store(folder, tmp_path, blocks=3)
        assert caplog.text.count("quantising") == 1
    assert first.fingerprint == second.fingerprint != third.fingerprint


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", None])
def test_a_damaged_file_is_computed_again(base, tmp_path, damage):
    _, folder = base
    before = open_store(folder, tmp_path, blocks=1).fingerprint
    (file,) = tmp_path.glob("int8-*/block.0.safetensors")
    if damage is None:  # whole, but of something else
        save_file({"x" + VALUES: torch.zeros(2, dtype=torch.int8)}, file)
    else:
        file.write_bytes(damage)
    assert open_store(folder, tmp_path, blocks=1).fingerprint == before


def test_another_checkpoint_is_computed_anew(tmp_path):
    base = write_model(tmp_path / "base", "gpt2")
    before = open_store(base, tmp_path, blocks=1)
    name = int8_names(before.architecture, 1)[0]
    tensors = load_file(base / "model.safetensors")
    tensors[name] = 2 * tensors[name]
    held = before.tensors()[name]
    save_file(tensors, base / "changed.safetensors")
    (base / "changed.safetensors").replace(base / "model.safetensors")
    assert torch.equal(open_store(base, tmp_path, blocks=1).tensors()[name], 2 * held)


def test_a_half_precision_base_is_rounded_from_its_own_values(tmp_path):
    base = write_model(tmp_path / "base", "gpt2")
    halved = {n: t.to(torch.bfloat16) for n, t in load_file(base / "model.safetensors").items()}
    save_file(halved, base / "model.safetensors")
    store = open_store(base, tmp_path, blocks=1)
    name = int8_names(store.architecture, 1)[0]
    expected = quantise(halved[name].float().numpy(), inputs_first=True).dequantised()
    np.testing.assert_array_equal(store.tensors()[name].numpy(), expected)


def test_a_weight_that_is_no_number_is_named(tmp_path):
    base = write_model(tmp_path / "base", "gpt2")
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=re.escape("transformer.h.0.mlp.c_fc.weight")):
        open_store(base, tmp_path, blocks=1)


def test_more_blocks_than_the_model_has_are_refused(base, tmp_path):
    with pytest.raises(PlanError, match=r"int8_blocks is 4, but this model has 3 blocks"):
        open_store(base[1], tmp_path, blocks=4)


def test_a_checkpoint_in_8_bits_is_still_refused(tmp_path):
    base = write_model(tmp_path / "base", "gpt2")
    tensors = load_file(base / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match="quantised checkpoints are not supported"):
        open_store(base, tmp_path, blocks=1)
