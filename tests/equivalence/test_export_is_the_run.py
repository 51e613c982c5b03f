"""Law 5, the algebra: the exported folder on the plain model is base + G.

13 blocks, so that block 1 and blocks 10 to 12 would be mixed up by a careless pattern.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from coordinator.aggregation import GlobalUpdate, ModuleUpdate, initial
from coordinator.checkpoints import Checkpoint, latest, save
from coordinator.export import export_adapter, export_merged
from coordinator.factoring import Term, recompress
from coordinator.model_card import CardDevice, ModelCard
from shared.errors import ModelError, PlanError, StorageError

# PEFT 0.21 asks transformers 5.23 by a name that is going away; neither is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BLOCKS = 13
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        n_layer=BLOCKS, n_embd=32, n_head=2, vocab_size=100, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    ),
    "llama": LlamaConfig(
        num_hidden_layers=BLOCKS, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
    "qwen2": Qwen2Config(
        num_hidden_layers=BLOCKS, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
SUFFIXES = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc"),
    "llama": ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"),
}
CARD = ModelCard(
    base_model="tiny",
    base_licence="mit",
    run_id="run-1",
    strategy="hsplitlora",
    hand_back="residual",
    labels="device",
    rounds=5,
    steps=100,
    devices=(CardDevice(device="nano", split_layer=3, ranks=(8, 4, 8), target_tokens=1234),),
    perplexity_before=220.4,
    perplexity_after=9.87,
)


def plain_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # the default is too small to see a change
    return model


def shapes(model: PreTrainedModel, family: str) -> dict[str, tuple[int, int]]:
    """(out, in) of every target module; GPT-2's Conv1D keeps its weight as (in, out)."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(SUFFIXES[family]):
            first, second = module.weight.shape
            found[name] = (second, first) if family == "gpt2" else (first, second)
    return found


def random_update(model: PreTrainedModel, family: str) -> GlobalUpdate:
    """A rank of its own for every module, 0 for some."""
    random = np.random.default_rng(1)
    update = dict(initial(shapes(model, family)))
    for index, (module, one) in enumerate(update.items()):
        out_features, in_features = one.total.shape
        rank = index % 8
        term = Term(
            0.1 * random.standard_normal((out_features, rank)),
            random.standard_normal((rank, in_features)),
        )
        total = recompress([term], shape=one.total.shape, tolerance=1e-6).delta
        update[module] = ModuleUpdate(total, total)
    return update


def add_dense(model: PreTrainedModel, update: GlobalUpdate, family: str) -> None:
    with torch.no_grad():
        for module, one in update.items():
            delta = torch.from_numpy(one.total.delta_OI()).float()
            weight = model.get_submodule(module).weight
            weight += delta.T if family == "gpt2" else delta


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(60).reshape(3, 20) * 7 % 100
    with torch.no_grad():
        return model(tokens).logits


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.linalg.norm(one - other) / torch.linalg.norm(other))


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def run(request, tmp_path_factory) -> tuple[str, Path, GlobalUpdate, torch.Tensor]:
    """Family, the base on disk, an update, and the logits of base + dense G."""
    family = request.param
    base = tmp_path_factory.mktemp(family) / "base"
    model = plain_model(family)
    model.save_pretrained(base)
    update = random_update(model, family)
    before = logits(model)
    add_dense(model, update, family)
    expected = logits(model)
    assert distance(before, expected) > 0.1, "the update must matter for this test to mean anything"
    return family, base, update, expected


def test_peft_opens_the_folder_and_gives_the_logits_of_base_plus_update(run, tmp_path):
    _, base, update, expected = run
    folder = export_adapter(update, str(base), tmp_path / "adapter", card=CARD)
    plain = AutoModelForCausalLM.from_pretrained(base)
    opened = PeftModel.from_pretrained(plain, str(folder)).eval()
    assert distance(logits(opened), expected) <= 1e-4
    scalings = {m.scaling["default"] for m in opened.modules() if hasattr(m, "lora_A")}
    assert scalings == {1.0}
    ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in opened.named_modules()
        if hasattr(module, "lora_A")
    }
    assert ranks == {m: one.total.rank for m, one in update.items() if one.total.rank}


def test_the_merged_model_is_the_same(run, tmp_path):
    _, base, update, expected = run
    adapter = export_adapter(update, str(base), tmp_path / "adapter", card=CARD)
    merged = export_merged(adapter, str(base), tmp_path / "merged")
    opened = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert distance(logits(opened), expected) <= 1e-4


def test_a_checkpoint_exports_the_same_adapter(run, tmp_path):
    _, base, update, _ = run
    saved = Checkpoint(round=1, step=2, update=update, server={}, optimizer={}, state={})
    save(tmp_path / "checkpoints", saved, keep=1)
    found = latest(tmp_path / "checkpoints")
    assert found is not None
    one = export_adapter(update, str(base), tmp_path / "one", card=CARD)
    other = export_adapter(found.update, str(base), tmp_path / "other", card=CARD)
    weights = "adapter_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    base = tmp_path_factory.mktemp("gpt2") / "base"
    model = plain_model("gpt2")
    model.save_pretrained(base)
    return base, model


def test_the_folder_holds_a_card_that_tells_the_run(gpt2, tmp_path):
    base, model = gpt2
    folder = export_adapter(random_update(model, "gpt2"), str(base), tmp_path / "a", card=CARD)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    header, text = (folder / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(header)["license"] == "mit"
    assert yaml.safe_load(header)["library_name"] == "peft"
    for fact in ("run-1", "| nano | 3 | 4, 8 | 1234 |", "220.40 before, 9.87 after", "5 rounds"):
        assert fact in text


def test_a_new_export_replaces_the_old_one_whole(gpt2, tmp_path):
    base, model = gpt2
    folder = tmp_path / "adapter"
    update = random_update(model, "gpt2")
    export_adapter(update, str(base), folder, card=CARD)
    (folder / "left-over").touch()
    first = next(m for m, one in update.items() if one.total.rank)
    export_adapter({first: update[first]}, str(base), folder, card=CARD)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == [first]
    assert config["rank_pattern"] == {}
    assert not (folder / "left-over").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_run_that_learnt_nothing_exports_an_adapter_that_changes_nothing(gpt2, tmp_path):
    base, model = gpt2
    update = initial(shapes(model, "gpt2"))
    folder = export_adapter(update, str(base), tmp_path / "adapter", card=CARD)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    assert torch.equal(logits(opened.eval()), logits(model))


def test_what_cannot_be_exported_is_said_and_not_written(gpt2, tmp_path):
    base, model = gpt2
    folder = tmp_path / "adapter"
    with pytest.raises(PlanError, match="adapts no module"):
        export_adapter({}, str(base), folder, card=CARD)
    with pytest.raises(ModelError, match="no-such-folder"):
        export_adapter(
            initial({"transformer.h.0.attn.c_attn": (96, 32)}),
            str(tmp_path / "no-such-folder"),
            folder,
            card=CARD,
        )
    foreign = random_update(plain_model("llama"), "llama")
    with pytest.raises(ModelError, match="does not take this adapter"):
        export_adapter(foreign, str(base), folder, card=CARD)
    wrong_shape = initial({"transformer.h.0.attn.c_attn": (96, 33)})
    with pytest.raises(ModelError, match="another model"):
        export_adapter(wrong_shape, str(base), folder, card=CARD)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        export_adapter(
            random_update(model, "gpt2"), str(base), tmp_path / "file" / "adapter", card=CARD
        )
    assert not folder.exists()
