"""What is known of a model family without loading it."""

from __future__ import annotations

import pytest

from shared.architecture import FAMILIES, ModelArchitecture
from shared.errors import ModelError, PlanError
from shared.terms import LoraTerms

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def gpt2(**changes):
    return ModelArchitecture.from_config({**GPT2, **changes})


def llama(**changes):
    return ModelArchitecture.from_config({**LLAMA, **changes})


def test_an_unsupported_family_is_refused_with_the_supported_ones():
    with pytest.raises(ModelError, match="'bloom' are not supported") as caught:
        gpt2(model_type="bloom")
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_layer": None}, "n_layer"),
        ({"n_layer": "12"}, "'12'"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"model_type": None}, "None"),
        ({"model_type": ["gpt2"]}, "not supported"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(changes, says):
    with pytest.raises(ModelError, match=says):
        gpt2(**changes)


def test_grouped_queries_show_in_the_features():
    architecture = llama()
    assert architecture.features("model.layers.0.self_attn.q_proj") == (2048, 2048)
    assert architecture.features("model.layers.15.self_attn.v_proj") == (2048, 512)
    assert architecture.features("model.layers.3.mlp.down_proj") == (8192, 2048)


def test_head_width_need_not_divide_the_hidden_size():
    architecture = llama(model_type="qwen3", head_dim=128)
    assert architecture.features("model.layers.0.self_attn.q_proj") == (2048, 4096)
    assert architecture.features("model.layers.0.self_attn.o_proj") == (4096, 2048)


@pytest.mark.parametrize(
    "module", ["model.layers.16.self_attn.q_proj", "model.layers.0.nothing", "lm_head", ""]
)
def test_features_of_what_cannot_be_adapted_are_an_error(module):
    with pytest.raises(ModelError):
        llama().features(module)


def test_every_tensor_belongs_to_one_piece():
    architecture = gpt2()
    assert architecture.piece_of("transformer.wte.weight") == "embeddings"
    assert architecture.piece_of("transformer.wpe.weight") == "embeddings"
    assert architecture.piece_of("transformer.h.11.mlp.c_fc.bias") == "block.11"
    assert architecture.piece_of("transformer.h.1.attn.c_attn.bias") == "block.1"
    assert architecture.piece_of("transformer.ln_f.weight") == "final_norm"


def test_buffers_of_old_checkpoints_and_tied_heads_belong_to_none():
    assert gpt2().piece_of("transformer.h.0.attn.bias") is None
    assert gpt2().piece_of("transformer.h.0.attn.masked_bias") is None
    assert gpt2().piece_of("lm_head.weight") is None
    assert llama().piece_of("model.layers.2.self_attn.rotary_emb.inv_freq") is None
    assert llama().piece_of("lm_head.weight") == "head"
    assert llama(tie_word_embeddings=True).piece_of("lm_head.weight") is None


def test_a_block_beyond_the_last_is_an_error():
    with pytest.raises(ModelError, match=r"transformer\.h\.11"):
        gpt2().piece_of("transformer.h.12.ln_1.weight")


def test_a_tied_head_costs_a_front_only_its_norm():
    front = gpt2().front_pieces(2, head_on_device=True)
    assert front == ("embeddings", "block.0", "block.1", "final_norm")
    assert gpt2().front_pieces(1, head_on_device=False) == ("embeddings", "block.0")


def test_an_untied_head_is_a_piece_of_its_own():
    front = llama().front_pieces(1, head_on_device=True)
    assert front == ("embeddings", "block.0", "final_norm", "head")


@pytest.mark.parametrize("split_layer", [0, 13, -1])
def test_a_split_layer_outside_the_model_names_both_numbers(split_layer):
    with pytest.raises(PlanError, match=rf"{split_layer} does not exist.*12 blocks"):
        gpt2().check_split_layer(split_layer)


def test_sequences_longer_than_the_positions_are_refused():
    gpt2().check_max_length(1024)
    with pytest.raises(PlanError, match="1025.*1024"):
        gpt2().check_max_length(1025)


def test_default_targets_are_pefts():
    peft = pytest.importorskip("peft.utils.constants")
    table = peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for family in FAMILIES.values():
        assert list(family.default_targets) == table[family.model_type]


def test_a_target_matches_the_end_of_a_path_after_a_dot():
    lora = LoraTerms(r=4, target_modules=("c_proj",))
    assert set(gpt2().target_modules(lora, blocks=range(1, 2))) == {
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_proj",
    }
    lora = LoraTerms(r=4, target_modules=("transformer.h.1.attn.c_attn",))
    assert gpt2().target_modules(lora, blocks=range(12)) == {"transformer.h.1.attn.c_attn": 4}


def test_patterns_change_ranks_and_rank_zero_is_left_out():
    pattern = {"h.1.attn.c_attn": 16, "h.2.attn.c_attn": 0}
    lora = LoraTerms(r=8, rank_pattern=pattern)
    ranks = gpt2().target_modules(lora, blocks=range(12))
    assert ranks["transformer.h.1.attn.c_attn"] == 16
    assert ranks["transformer.h.11.attn.c_attn"] == 8
    assert "transformer.h.2.attn.c_attn" not in ranks


@pytest.mark.parametrize("target", ["q_proj", "attn", "_attn", "wte", "transformer.h.12.mlp.c_fc"])
def test_a_target_that_matches_nothing_is_named_with_what_exists(target):
    with pytest.raises(PlanError, match=rf"{target}.*attn\.c_attn.*mlp\.c_fc"):
        gpt2().target_modules(LoraTerms(target_modules=("c_attn", target)), blocks=range(1))


def test_a_rank_above_the_smaller_side_is_refused():
    lora = LoraTerms(r=513, target_modules=("v_proj",))
    with pytest.raises(PlanError, match="513.*512"):
        llama().target_modules(lora, blocks=range(1))
