"""The terms of a run: patterns as PEFT reads them, limits as the types say."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms

Q = "model.layers.3.self_attn.q_proj"
DOWN = "model.layers.11.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "module", "rank"),
    [
        ({}, Q, 8),
        ({"q_proj": 16}, Q, 16),
        ({"q_proj": 16}, DOWN, 8),
        ({"q_proj": 0}, Q, 0),
        ({"proj": 16}, Q, 8),  # a whole part of the path, not the end of a word
        ({"self_attn.q_proj": 16}, Q, 16),
        ({Q: 16}, Q, 16),
        ({"layers.3": 16}, Q, 8),  # the end of the path, not its middle
        ({r"layers\.[0-5]\..*": 16}, Q, 16),
        ({r"layers\.[0-5]\..*": 16}, DOWN, 8),
        ({"q_proj|down_proj": 16}, DOWN, 16),
        ({"q_proj": 16, "self_attn.q_proj": 32}, Q, 16),  # the first that fits
    ],
)
def test_a_rank_pattern_is_matched_against_the_end_of_the_path(pattern, module, rank):
    assert LoraTerms(rank_pattern=pattern).rank_of(module) == rank


def test_an_alpha_pattern_replaces_the_alpha_and_not_the_rank():
    lora = LoraTerms(r=4, lora_alpha=16, alpha_pattern={"q_proj": 2})
    assert (lora.alpha_of(Q), lora.rank_of(Q)) == (2.0, 4)
    assert lora.alpha_of(DOWN) == 16.0


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (LoraTerms, {"r": -1}),
        (LoraTerms, {"r": 4097}),
        (LoraTerms, {"lora_alpha": 0}),
        (LoraTerms, {"lora_alpha": float("nan")}),
        (LoraTerms, {"lora_dropout": 1.0}),
        (LoraTerms, {"rank_pattern": {"q_proj": -1}}),
        (LoraTerms, {"alpha_pattern": {"q_proj": 0}}),
        (OptimizerTerms, {"name": "lion"}),
        (OptimizerTerms, {"learning_rate": 0}),
        (OptimizerTerms, {"beta2": 1.0}),
        (OptimizerTerms, {"epsilon": 0}),
        (OptimizerTerms, {"warmup_steps": -1}),
        (OptimizerTerms, {"min_learning_rate_ratio": 1.1}),
        (OptimizerTerms, {"max_grad_norm": -1}),
        (TrainingTerms, {"labels": "both"}),
        (TrainingTerms, {"wire_dtype": "int8"}),
        (TrainingTerms, {"max_length": 1}),
        (TrainingTerms, {"int8_blocks": -1}),
        (TrainingTerms, {"seed": 2**31}),
        (TrainingTerms, {"total_steps": 0}),
    ],
)
def test_a_term_out_of_its_limits_is_refused(kind, values):
    assert TypeAdapter(kind).validate_python({}) == kind()
    with pytest.raises(ValidationError, match=next(iter(values))):
        TypeAdapter(kind).validate_python(values)
