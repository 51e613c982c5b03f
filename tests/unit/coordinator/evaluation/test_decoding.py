"""Decoding is transformers' own search on the plain PEFT model, however prompts are batched."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from coordinator import demo
from coordinator.evaluation.choices import Decoding
from coordinator.evaluation.decoding import decode
from coordinator.evaluation.examples import Example
from coordinator.evaluation.opening import AdaptedModel, find_adapter, open_adapted
from coordinator.evaluation.progress import Progress
from shared.errors import DataError
from tests.support import exported_adapters

PROMPTS = (
    "The king said ->",
    "name : The Eagle | Type : coffee shop | area : riverside ->",
    "In 1915 ,",
    "What is a cat ? The",
    "O",
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return exported_adapters.write_adapter(tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def adapted(adapter) -> AdaptedModel:
    return open_adapted(find_adapter(adapter), device="cpu")


def written(adapted: AdaptedModel, *prompts: str, **how: float) -> tuple[str, ...]:
    examples = [
        Example(prompt=prompt, references=("x",), where=f"data:{line}")
        for line, prompt in enumerate(prompts, start=1)
    ]
    choices = {"no_repeat_ngram": 0, "max_new_tokens": 16, "batch": 3, **how}
    return decode(adapted, examples, Decoding(**choices), Progress("decoding"))


def repeats(adapted: AdaptedModel, text: str, *, size: int) -> bool:
    (ids,) = adapted.tokenizer.prompts([text])
    runs = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return len(set(runs)) < len(runs)


@pytest.mark.parametrize("end", ["<|endoftext|>", " the"])
@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 4, "length_penalty": 0.8}])
def test_it_is_what_the_plain_peft_model_generates_prompt_by_prompt(adapter, adapted, search, end):
    plain = exported_adapters.opened_with_peft(adapter)
    tokenizer = AutoTokenizer.from_pretrained(demo.base_folder())
    (eos,) = tokenizer(end)["input_ids"]
    ends = {"pad_token_id": 0, "eos_token_id": eos}
    expected = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        (ids,) = plain.generate(**given, do_sample=False, max_new_tokens=16, **ends, **search)
        answer = tokenizer.decode(ids[given["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(answer.removesuffix(end).strip())
    assert len(set(expected)) > 1, "a model that always says the same would prove nothing"
    wanted = dataclasses.replace(adapted, eos_token_id=eos)
    found = written(wanted, *PROMPTS, beams=search["num_beams"], length_penalty=0.8)
    assert found == tuple(expected)


def test_the_adapter_and_the_length_penalty_matter(adapter, adapted, tmp_path):
    nothing = tmp_path / "nothing"
    shutil.copytree(adapter, nothing)
    config = json.loads((nothing / "adapter_config.json").read_text())
    zeros = {"lora_alpha": 0, "alpha_pattern": {}}
    (nothing / "adapter_config.json").write_text(json.dumps({**config, **zeros}))
    bare = open_adapted(find_adapter(nothing), device="cpu")
    assert written(bare, *PROMPTS, beams=1) != written(adapted, *PROMPTS, beams=1)
    short, long = (
        written(bare, *PROMPTS, beams=4, length_penalty=penalty, max_new_tokens=40)
        for penalty in (-5.0, 5.0)
    )
    assert sum(map(len, short)) < sum(map(len, long))


def test_an_answer_ends_before_the_end_of_text_token(adapted):
    assert written(adapted, "O", beams=1, max_new_tokens=6) == (", I am I am I",)
    (am,) = adapted.tokenizer.encode([" am"])[0].ids
    ended = dataclasses.replace(adapted, eos_token_id=am)
    assert written(ended, "O", beams=1, max_new_tokens=6) == (", I",)


def test_no_run_of_tokens_comes_twice_in_an_answer(adapted):
    (free,) = written(adapted, "O ,", beams=1, max_new_tokens=40)
    assert repeats(adapted, free, size=3), "a model that never repeats itself would prove nothing"
    (kept,) = written(adapted, "O ,", beams=1, max_new_tokens=40, no_repeat_ngram=3)
    assert len(kept) > 40
    assert not repeats(adapted, kept, size=3)


def test_an_answer_may_repeat_its_prompt(adapted):
    """What a prompt asks to say is said in its own words: names, prices."""
    how = {"beams": 1, "max_new_tokens": 2, "no_repeat_ngram": 2}
    assert written(adapted, "O , I am I am", **how) == ("I am",)


def test_the_bases_own_generation_settings_play_no_part(adapter, adapted, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(demo.base_folder(), base)
    own = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 16, "top_k": 3}
    (base / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": 5}))
    other = open_adapted(find_adapter(adapter), base=str(base), device="cpu")
    assert written(other, *PROMPTS, beams=3) == written(adapted, *PROMPTS, beams=3)


def test_a_prompt_that_leaves_no_room_is_named(adapted):
    small = dataclasses.replace(adapted, positions=20)
    assert written(small, "O", beams=1, max_new_tokens=19)
    with pytest.raises(DataError, match=r"data:1: a prompt of 1 tokens and 20 new ones"):
        written(small, "O", beams=1, max_new_tokens=20)
    with pytest.raises(DataError, match=r"data:2: a prompt of \d+ tokens and 19 new ones .* 20 "):
        written(small, "O", PROMPTS[1], max_new_tokens=19)


def test_a_bar_is_drawn_for_a_terminal_only(adapted, capsys, monkeypatch):
    written(adapted, "O", beams=1, max_new_tokens=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    written(adapted, "O", beams=1, max_new_tokens=1)
    assert "1/1" in capsys.readouterr().err
