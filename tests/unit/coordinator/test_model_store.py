"""The base model in pieces: every checkpoint's form in, the same addressed bytes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from coordinator.model_store import ModelStore
from coordinator.piece_content import PieceContent
from shared.errors import ModelError, ProtocolError
from shared.protocol.messages import ModelDescription
from shared.terms import TrainingChoices
from tests.support import vocabularies
from tests.support.tiny_models import FAMILIES, TinyModel, tiny_classifier, tiny_model


def write(
    folder: Path, model: TinyModel, *, tensors: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Write a checkpoint as a hub would hold it; ``tensors`` instead of the model's own."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = model.tensors if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(model.config))
    vocabularies.saved(vocabularies.byte_level(), folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": vocabularies.EOS, "bos_token": {"content": vocabularies.BOS}})
    )
    copies = {name: tensor.clone().contiguous() for name, tensor in stored.items()}
    safetensors.torch.save_file(copies, folder / "model.safetensors")
    return folder


def open_store(folder: Path) -> ModelStore:
    return ModelStore.open(str(folder), cache_folder=folder.parent / "hashes")


def served(store: ModelStore) -> dict[str, bytes]:
    """Return every piece, as a device would get it in ranges of 1000 bytes."""
    return {
        piece.name: b"".join(
            store.read(piece.sha256, offset=at, length=min(1000, piece.size_bytes - at))
            for at in range(0, piece.size_bytes, 1000)
        )
        for piece in store.describe().pieces
    }


def hashes(description: ModelDescription) -> dict[str, str]:
    return {piece.name: piece.sha256 for piece in description.pieces}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_are_the_model_each_tensor_once(tmp_path, family):
    model = tiny_model(family)
    store = open_store(write(tmp_path / "base", model))
    pieces = served(store)
    assert {n: hashlib.sha256(b).hexdigest() for n, b in pieces.items()} == hashes(store.describe())
    del pieces["tokenizer"]
    found: dict[str, torch.Tensor] = {}
    for name, data in pieces.items():
        tensors = safetensors.torch.load(data)
        assert {model.architecture.piece_of(tensor) for tensor in tensors} == {name}
        found.update(tensors)
    wanted = {n: t for n, t in model.tensors.items() if model.architecture.piece_of(n) is not None}
    assert found.keys() == wanted.keys() == set(store.tensors())
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(store.tensors()[name], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_forms_of_a_checkpoint_give_the_same_pieces(tmp_path, family):
    model = tiny_model(family)
    reference = hashes(open_store(write(tmp_path / "plain", model)).describe())
    prefix = model.architecture.family.blocks.partition(".")[0] + "."
    bare = {name.removeprefix(prefix): tensor for name, tensor in model.tensors.items()}
    bare["h.0.attn.bias" if family == "gpt2" else "layers.0.self_attn.rotary_emb.inv_freq"] = (
        torch.ones(1, 1, 4, 4)
    )
    assert hashes(open_store(write(tmp_path / "bare", model, tensors=bare)).describe()) == reference
    saved = write(tmp_path / "saved", model)
    (saved / "model.safetensors").unlink()
    model.hugging_face().save_pretrained(saved, max_shard_size="20KB")
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    assert hashes(open_store(saved).describe()) == reference


def test_weights_keep_the_dtype_they_are_stored_in(tmp_path):
    model = tiny_model("llama")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in model.tensors.items()}
    store = open_store(write(tmp_path / "base", model, tensors=halved))
    assert {tensor.dtype for tensor in store.tensors().values()} == {torch.bfloat16}
    assert torch.equal(store.tensors()["lm_head.weight"], halved["lm_head.weight"])


def test_tensors_can_be_changed_without_changing_the_files(tmp_path):
    store = open_store(write(tmp_path / "base", tiny_model("gpt2")))
    before = store.tensors()["transformer.wte.weight"].clone()
    store.tensors()["transformer.wte.weight"].zero_()
    assert torch.equal(store.tensors()["transformer.wte.weight"], before)


def test_a_second_start_does_not_hash_again_and_changed_files_do(tmp_path):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    reference = hashes(open_store(folder).describe())
    (memory,) = (tmp_path / "hashes").iterdir()
    memory.write_text(memory.read_text().replace(reference["final_norm"], "0" * 64))
    assert hashes(open_store(folder).describe())["final_norm"] == "0" * 64
    other = write(tmp_path / "base", tiny_model("gpt2", seed=1))
    assert hashes(open_store(other).describe())["final_norm"] not in (
        "0" * 64,
        reference["final_norm"],
    )


def test_a_damaged_memory_of_hashes_is_replaced(tmp_path):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    reference = open_store(folder).describe()
    (memory,) = (tmp_path / "hashes").iterdir()
    memory.write_text("[{}]")
    assert open_store(folder).describe() == reference


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    begin=st.integers(0, 120),
    length=st.integers(1, 120),
)
def test_any_range_of_a_piece_is_what_lies_there(sizes, begin, length):
    content = PieceContent(tuple(memoryview(bytes([i]) * size) for i, size in enumerate(sizes)))
    whole = b"".join(content.views)
    if begin + length <= len(whole):
        assert bytes(content.read(begin, length)) == whole[begin : begin + length]


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, 0), (0, 10**9), (10**9, 1)])
def test_a_range_outside_of_a_piece_is_refused(tmp_path, offset, length):
    store = open_store(write(tmp_path / "base", tiny_model("gpt2")))
    sha256 = hashes(store.describe())["block.0"]
    with pytest.raises(ProtocolError, match="are not in piece"):
        store.read(sha256, offset=offset, length=length)


def test_an_unknown_piece_is_refused(tmp_path):
    store = open_store(write(tmp_path / "base", tiny_model("gpt2")))
    with pytest.raises(ProtocolError, match="this model has no piece 0000"):
        store.read("0" * 64, offset=0, length=1)


# --- what stands beside the weights -----------------------------------------------------------


def test_devices_are_told_name_tokens_and_template_but_not_where_the_folder_lies(tmp_path):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    described = open_store(folder).describe()
    assert described.name == "base"
    assert described.special_tokens == {
        "eos_token": vocabularies.EOS,
        "bos_token": vocabularies.BOS,
    }
    assert described.eos_token_id == 0
    assert described.chat_template == "{{ messages }}"
    assert str(tmp_path) not in repr(described)


@pytest.mark.parametrize("stored", ["T", [{"name": "x", "template": "no"},
                                          {"name": "default", "template": "T"}]])  # fmt: skip
def test_a_template_in_the_tokenizers_config_is_found(tmp_path, stored):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    assert open_store(folder).describe().chat_template == "T"


@pytest.mark.parametrize(("in_config", "expected"), [(7, 7), ([5, 9], 5), (None, None)])
def test_without_an_eos_token_the_configs_id_counts(tmp_path, in_config, expected):
    folder = write(tmp_path / "base", tiny_model("gpt2", eos_token_id=in_config))
    (folder / "tokenizer_config.json").unlink()
    assert open_store(folder).describe().eos_token_id == expected


# --- what is refused --------------------------------------------------------------------------


def test_a_missing_folder_is_refused():
    with pytest.raises(ModelError, match=r"model \./none: no such folder; check model.name"):
        ModelStore.open("./none", cache_folder=Path("unused"))


def test_a_hub_name_that_is_not_in_the_cache_is_refused_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"the hub cannot be reached .* or give a folder"):
        ModelStore.open("nobody/nothing", cache_folder=tmp_path)


def test_an_impossible_hub_name_is_refused(tmp_path):
    with pytest.raises(ModelError, match="neither a folder here nor a possible hub name"):
        ModelStore.open("a b/c*d", cache_folder=tmp_path)


def test_a_hub_model_in_the_cache_is_found_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--some--model"
    write(cached / "snapshots" / commit, tiny_model("gpt2"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    store = ModelStore.open("some/model", cache_folder=tmp_path / "hashes")
    assert (store.folder.name, store.folder.revision) == ("some/model", commit)


def test_an_unsupported_architecture_is_refused_with_the_list_of_supported_ones(tmp_path):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    transformers.BloomConfig(hidden_size=32).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"gpt2.*llama.*qwen2.*qwen3"):
        open_store(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights .* convert them with transformers"):
        open_store(folder)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "config.json is missing; is this a Hugging Face model"),
        ("tokenizer.json", "tokenizer.json is missing, and devices read text with it alone"),
        ("model.safetensors", "no model.safetensors and no index of several"),
    ],
)
def test_a_missing_file_is_named(tmp_path, missing, words):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=words):
        open_store(folder)


@pytest.mark.parametrize("damaged", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_text_is_named(tmp_path, damaged):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    (folder / damaged).write_text('{"a": ')
    with pytest.raises(ModelError, match=damaged):
        open_store(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_torn_weights_file_is_named(tmp_path, keep):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged .*; fetch it again"):
        open_store(folder)


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../other.safetensors"}}',
                                   '{"weight_map": {"a": "model-00001.safetensors"}}'])  # fmt: skip
def test_an_index_of_files_that_are_not_in_the_folder_is_refused(tmp_path, index):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    (tmp_path / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="names 1 files that are not in the folder"):
        open_store(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path, index):
    folder = write(tmp_path / "base", tiny_model("gpt2"))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index.json is damaged"):
        open_store(folder)


def test_a_missing_tensor_is_named(tmp_path):
    model = tiny_model("llama")
    rest = {n: t for n, t in model.tensors.items() if n != "lm_head.weight"}
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*such as lm_head.weight"):
        open_store(write(tmp_path / "base", model, tensors=rest))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    model = tiny_model("gpt2")
    changed = {**model.tensors, "transformer.wpe.weight": torch.zeros(5, 32)}
    with pytest.raises(ModelError, match=r"wpe.weight has the shape \[5, 32\], but .* \[64, 32\]"):
        open_store(write(tmp_path / "base", model, tensors=changed))


def test_a_quantised_tensor_is_refused(tmp_path):
    model = tiny_model("gpt2")
    changed = dict(model.tensors)
    changed["transformer.wpe.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    with pytest.raises(ModelError, match="stored as I8; quantised checkpoints are not supported"):
        open_store(write(tmp_path / "base", model, tensors=changed))


def test_a_tied_head_that_differs_is_refused(tmp_path):
    model = tiny_model("qwen2")
    changed = {**model.tensors, "lm_head.weight": torch.zeros(101, 32)}
    with pytest.raises(ModelError, match="set tie_word_embeddings to false there"):
        open_store(write(tmp_path / "base", model, tensors=changed))


def encoder_folder(folder: Path, family: str, *, without: str = "", bare: bool = False) -> Path:
    """Write an encoder as on the hub: ``bare`` as a plain BertModel's weights are named."""
    model = tiny_classifier(family)
    stored = {
        name.removeprefix(f"{family}.") if bare else name: tensor
        for name, tensor in model.tensors.items()
        if not name.startswith("classifier") and not (without and without in name)
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    vocabularies.saved(vocabularies.byte_level(), folder)
    copies = {name: tensor.clone().contiguous() for name, tensor in stored.items()}
    safetensors.torch.save_file(copies, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_cut_into_its_pieces_whatever_its_tensors_are_called(tmp_path, family, bare):
    folder = encoder_folder(tmp_path / "model", family, bare=bare)
    training = TrainingChoices(task="classification", classes=("a", "b"))
    store = ModelStore.open(str(folder), cache_folder=tmp_path / "hashes", training=training)
    head = {"head"} if family == "bert" else set()
    blocks = {f"block.{j}" for j in range(3)}
    assert {p.name for p in store.describe().pieces} == {"tokenizer", "embeddings", *blocks, *head}
    model = tiny_classifier(family)
    for name, tensor in store.tensors().items():
        torch.testing.assert_close(tensor, model.tensors[name], rtol=0, atol=0)


def test_a_bert_without_a_pooler_is_refused(tmp_path):
    folder = encoder_folder(tmp_path / "model", "bert", without="pooler")
    with pytest.raises(ModelError, match=r"lacks 2 tensors .*bert.pooler.dense.bias.*a pooler"):
        ModelStore.open(str(folder), cache_folder=tmp_path / "hashes")
