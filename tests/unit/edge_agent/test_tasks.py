"""Records as sequences with their targets, by the run's task."""

from __future__ import annotations

import itertools
import json

import pytest
from tokenizers import processors

from edge_agent.backends.base import NO_TARGET
from edge_agent.records import Records
from edge_agent.tasks import sequences_of
from edge_agent.vocabulary import Vocabulary
from shared.architecture import ModelArchitecture
from shared.errors import DataError
from shared.terms import TrainingTerms
from tests.support.vocabularies import BOS, EOS, byte_level, described, saved

CLASSES = ("no", "yes")
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64},
    "bert": {
        "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "max_position_embeddings": 64,
    },
}  # fmt: skip


def framing():
    """Return a tokenizer that frames texts as BERT's does."""
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} $B:1 {EOS}:1",
        special_tokens=[(EOS, 0), (BOS, 1)],
    )
    return tokenizer


def sequences(folder, rows, *, family="bert", tokenizer=None, max_length=64):
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    training = TrainingTerms(task="classification", classes=CLASSES, max_length=max_length)
    config = {**CONFIGS[family], "vocab_size": 320}
    return sequences_of(
        Records.load(path),
        Vocabulary(saved(tokenizer or framing(), folder), described()),
        training=training,
        architecture=ModelArchitecture.from_config(config, training),
    )


PAIRS = [
    {"text": "It is a shop", "text_pair": "near it", "label": "yes"},
    {"text": "What", "text_pair": "It is a coffee shop", "label": 0},
]


@pytest.mark.parametrize(("family", "at"), [("bert", 0), ("gpt2", -1)])
def test_the_class_stands_where_the_classifier_reads(family, at, tmp_path):
    (batch,) = sequences(tmp_path, PAIRS, family=family).batches([0, 1], 2)
    assert batch.target_tokens == 2
    ends = [0, batch.lengths[0], sum(batch.lengths)]
    own = [batch.labels[a:b] for a, b in itertools.pairwise(ends)]
    assert sorted(int(one[at]) for one in own) == [0, 1]
    assert all((one != NO_TARGET).sum() == 1 for one in own)


def test_a_pair_is_framed_as_its_tokenizer_does_and_its_texts_are_told_apart(tmp_path):
    found = sequences(tmp_path, PAIRS)
    tokenizer = framing()
    for index, row in enumerate(PAIRS):
        expected = tokenizer.encode(row["text"], row["text_pair"])
        (batch,) = found.batches([index], 1)
        assert batch.input_ids.tolist() == expected.ids
        assert batch.token_types.tolist() == expected.type_ids
        assert set(expected.type_ids) == {0, 1}


def test_single_texts_have_no_types(tmp_path):
    rows = [{"text": "It is", "label": 0}, {"text": "a shop", "label": 1}]
    (batch,) = sequences(tmp_path, rows).batches([0, 1], 2)
    assert batch.token_types is None


def test_long_pairs_are_cut_with_their_special_tokens_kept(tmp_path):
    rows = [{**PAIRS[0], "text": "coffee " * 30}, PAIRS[1]]
    (batch,) = sequences(tmp_path, rows, max_length=12).batches([0], 1)
    assert batch.lengths == (12,)
    assert batch.input_ids[[0, -1]].tolist() == [1, 0]
    assert batch.token_types[-1] == 1


def test_a_length_without_room_for_both_texts_is_an_error(tmp_path):
    with pytest.raises(DataError, match="training.max_length is 4"):
        sequences(tmp_path, PAIRS, max_length=4)
