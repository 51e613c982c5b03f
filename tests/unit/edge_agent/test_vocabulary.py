"""From text to tokens: which of them are learnt, what stands around them, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.backends.base import NO_TARGET
from edge_agent.dataset import Sequences
from edge_agent.records import Record, Records
from edge_agent.vocabulary import Vocabulary
from shared.errors import DataError, ModelError
from tests.support import vocabularies

SECRET = "Prometheus"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def records(format_: Any, *rows: dict[str, Any]) -> Records:
    made = tuple(Record(line, row) for line, row in enumerate(rows, start=1))
    return Records(Path("my.jsonl"), format_, made)


def prompts(*pairs: tuple[str, str]) -> Records:
    return records("prompt", *({"prompt": p, "completion": c} for p, c in pairs))


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def vocabulary(tokenizer: Any, folder: Path, **described: Any) -> Vocabulary:
    description = vocabularies.described(**described)
    return Vocabulary(vocabularies.saved(tokenizer, folder), description)


def tokens(sequences: Sequences, index: int = 0) -> tuple[list[int], list[int]]:
    where = slice(sequences.starts[index], sequences.starts[index + 1])
    return sequences.input_ids_M[where].tolist(), sequences.labels_M[where].tolist()


def learnt(tokenizer: Any, sequences: Sequences, index: int = 0) -> str:
    labels = [label for label in tokens(sequences, index)[1] if label != NO_TARGET]
    return str(tokenizer.decode(labels, skip_special_tokens=False))


def test_all_of_a_text_is_learnt_and_then_its_end(tmp_path):
    tokenizer = vocabularies.byte_level()
    made = vocabulary(tokenizer, tmp_path).tokenise(
        records("text", {"text": "The Eagle"}), max_length=99
    )
    ids = [*tokenizer.encode("The Eagle").ids, 0]
    assert tokens(made) == (ids[:-1], ids[1:])
    assert made.input_ids_M.dtype == made.labels_M.dtype == np.int32


def test_a_text_that_ends_with_the_end_of_text_token_gets_no_second_one(tmp_path):
    made = vocabulary(vocabularies.byte_level(), tmp_path).tokenise(
        records("text", {"text": "a<|end|>"}), max_length=99
    )
    assert tokens(made)[1] == [0]


def test_only_the_completion_and_the_end_are_learnt(tmp_path):
    tokenizer = vocabularies.byte_level()
    made = vocabulary(tokenizer, tmp_path).tokenise(
        prompts(("name : The Eagle ->", " The Eagle .")), max_length=99
    )
    assert learnt(tokenizer, made) == " The Eagle .<|end|>"
    prompt = tokenizer.encode("name : The Eagle ->").ids
    assert tokens(made)[0][: len(prompt)] == prompt


def test_begin_of_text_stands_once_in_front_and_the_prompt_gets_no_end(tmp_path):
    tokenizer = vocabularies.byte_level(begin_of_text=True)
    made = vocabulary(tokenizer, tmp_path).tokenise(prompts(("a", "b")), max_length=99)
    (a,), (b,) = (tokenizer.encode(c, add_special_tokens=False).ids for c in "ab")
    assert tokens(made) == ([1, a, b], [NO_TARGET, b, 0])


def test_a_begin_of_text_token_makes_the_first_token_of_a_text_a_target(tmp_path):
    tokenizer = vocabularies.byte_level(begin_of_text=True)
    made = vocabulary(tokenizer, tmp_path).tokenise(records("text", {"text": "a"}), max_length=9)
    assert learnt(tokenizer, made) == "a<|end|>"


def test_the_seam_sets_no_word_boundary_of_its_own(tmp_path):
    made = vocabulary(vocabularies.word_boundary(), tmp_path, eos_token_id=None).tokenise(
        prompts(("a", " b")), max_length=9
    )
    assert tokens(made) == ([1], [2])  # "▁a" "▁b"; by itself " b" would be "▁" "▁b"


def test_a_token_across_the_seam_is_cut_there_as_it_is_when_the_model_is_used(tmp_path):
    made = vocabulary(vocabularies.merging(), tmp_path, eos_token_id=None).tokenise(
        prompts(("ca", "bc")), max_length=9
    )
    assert tokens(made) == ([3, 0, 1], [NO_TARGET, 1, 3])  # not "c" "ab" "c"


def test_long_sequences_are_cut_and_those_without_a_target_left_out(tmp_path, caplog):
    tokenizer = vocabularies.byte_level()
    prompt = "name : The Eagle ->"
    length = len(tokenizer.encode(prompt).ids)
    with caplog.at_level(logging.WARNING):
        made = vocabulary(tokenizer, tmp_path).tokenise(
            prompts((prompt, " coffee shop"), (SECRET + prompt, " coffee")), max_length=length
        )
    assert len(made) == 1
    assert len(tokens(made)[0]) == length
    assert sum(label != NO_TARGET for label in tokens(made)[1]) == 1
    assert "my.jsonl: 1 of 2 records have nothing to learn within" in caplog.text
    assert SECRET not in caplog.text


def test_nothing_left_is_an_error_that_says_what_to_change(tmp_path):
    with pytest.raises(DataError, match=r"2 of 2 records .* within 3 tokens; raise training.max"):
        vocabulary(vocabularies.byte_level(), tmp_path).tokenise(
            prompts((SECRET, "b"), (SECRET, "c")), max_length=3
        )


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"the model knows 5 tokens; .* belongs to another model"):
        vocabulary(vocabularies.byte_level(), tmp_path, vocab_size=5).tokenise(
            records("text", {"text": "abc"}), max_length=9
        )


def test_cutting_and_padding_stored_in_the_tokenizer_file_are_ignored(tmp_path):
    tokenizer = vocabularies.byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    made = vocabulary(tokenizer, tmp_path).tokenise(
        records("text", {"text": "The Eagle is"}, {"text": "a"}), max_length=99
    )
    assert learnt(tokenizer, made, 0).endswith("is<|end|>")
    assert len(tokens(made, 1)[0]) == 1


def test_a_damaged_tokenizer_is_a_model_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ModelError, match=r"is not a tokenizer.json"):
        Vocabulary(path, vocabularies.described())


def test_of_a_conversation_every_turn_of_the_assistant_is_learnt(tmp_path):
    tokenizer = vocabularies.byte_level()
    row = chat(("system", "s"), ("user", "hi"), ("assistant", "One"), ("user", "b"),
               ("assistant", "Two"), ("user", "bye"))  # fmt: skip
    made = vocabulary(tokenizer, tmp_path, chat_template=CHAT).tokenise(
        records("messages", row), max_length=99
    )
    assert learnt(tokenizer, made) == "One<|end|>\nTwo<|end|>\n"


def test_marks_of_the_template_decide_what_is_learnt(tmp_path):
    tokenizer = vocabularies.byte_level()
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }};{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    row = chat(("user", "hi"), ("assistant", "One"), ("user", "b"), ("assistant", "Two"))
    made = vocabulary(tokenizer, tmp_path, chat_template=template).tokenise(
        records("messages", row), max_length=99
    )
    assert learnt(tokenizer, made) == "One;Two;"


def test_where_earlier_turns_render_otherwise_only_the_last_is_learnt(tmp_path, caplog):
    tokenizer = vocabularies.byte_level()
    row = chat(("user", "hi"), ("assistant", SECRET), ("user", "b"), ("assistant", "Two"))
    with caplog.at_level(logging.WARNING):
        made = vocabulary(tokenizer, tmp_path, chat_template=THINKING).tokenise(
            records("messages", row), max_length=99
        )
    assert learnt(tokenizer, made) == "<think></think>Two<|end|>\n"
    assert "in 1 conversations only the last assistant turn is learnt" in caplog.text
    assert SECRET not in caplog.text


def test_a_refusal_of_the_template_names_the_line_and_not_the_text(tmp_path):
    template = "{{ raise_exception('no: ' + messages[0].content) }}"
    with pytest.raises(DataError) as caught:
        vocabulary(vocabularies.byte_level(), tmp_path, chat_template=template).tokenise(
            records("messages", chat(("assistant", SECRET))), max_length=99
        )
    assert "my.jsonl:1: " in str(caught.value)
    assert SECRET not in str(caught.value)


def test_conversations_need_a_model_with_a_chat_template(tmp_path):
    with pytest.raises(ModelError, match="has no chat template; use 'prompt' and 'completion'"):
        vocabulary(vocabularies.byte_level(), tmp_path).tokenise(
            records("messages", chat(("assistant", "a"))), max_length=99
        )
