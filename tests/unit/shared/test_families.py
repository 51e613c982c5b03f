"""Encoders and classifiers: what is known of a family for a task, without loading a model."""

from __future__ import annotations

import pytest
import torch
import transformers

from shared.architecture import FAMILIES, ModelArchitecture
from shared.errors import ModelError, PlanError
from shared.terms import LoraTerms, TrainingChoices
from tests.support.tiny_models import CLASSES, CONFIGS, ENCODERS

CLASSIFY = TrainingChoices(task="classification", classes=CLASSES)
EVERY = {**CONFIGS, **ENCODERS}


def test_the_tests_know_every_family():
    assert EVERY.keys() == FAMILIES.keys()


def of(family, training=None, **changes):
    return ModelArchitecture.from_config({**EVERY[family], **changes}, training)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused_where_text_is_to_be_written(family):
    with pytest.raises(ModelError, match=r"training.task: classification"):
        of(family, TrainingChoices())
    assert of(family).task == "classification", "what else it is for"


@pytest.mark.parametrize("classes", [(), ("one",)])
def test_fewer_than_two_classes_are_refused(classes):
    with pytest.raises(ModelError, match="two classes at least"):
        of("gpt2", TrainingChoices(task="classification", classes=classes))


def test_a_bert_that_writes_is_refused():
    with pytest.raises(ModelError, match="is_decoder"):
        of("bert", is_decoder=True)


@pytest.mark.parametrize("family", EVERY)
def test_every_tensor_of_the_hugging_face_classifier_has_its_place(family):
    """In a piece of the base, or among the classifier's new weights, in its shape."""
    architecture = of(family, CLASSIFY)
    config = transformers.CONFIG_MAPPING[family].from_dict(dict(EVERY[family]))
    config.num_labels = len(CLASSES)
    with torch.device("meta"):
        model = getattr(transformers, architecture.model_class)(config)
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    new = architecture.classifier_shapes()
    assert {n: s for n, s in shapes.items() if architecture.piece_of(n) is None} == new
    pieces = {architecture.piece_of(name) for name in shapes} - {None}
    blocks = {f"block.{j}" for j in range(architecture.block_count)}
    assert pieces == {"embeddings", *blocks, *architecture.head_pieces()}


@pytest.mark.parametrize(
    ("family", "pieces"),
    [("gpt2", ("final_norm",)), ("qwen2", ("final_norm",)), ("bert", ("head",)), ("roberta", ())],
)
def test_a_classifying_head_needs_no_words(family, pieces):
    architecture = of(family, CLASSIFY)
    assert architecture.head_pieces() == pieces
    front = architecture.front_pieces(1, head_on_device=True)
    assert front == ("embeddings", "block.0", *pieces)
    assert architecture.output_count == len(CLASSES)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        (
            "bert.encoder.layer.0.output.LayerNorm.beta",
            "bert.encoder.layer.0.output.LayerNorm.bias",
        ),
        ("pooler.dense.weight", "bert.pooler.dense.weight"),
    ],
)
def test_old_names_of_bert_are_known(stored, name):
    architecture = of("bert")
    assert architecture.full_name(stored) == name
    assert architecture.piece_of(name) is not None


@pytest.mark.parametrize(
    "stored", ["cls.predictions.bias", "classifier.weight", "embeddings.position_ids"]
)
def test_heads_for_other_tasks_are_left_where_they_are(stored):
    architecture = of("bert")
    assert architecture.piece_of(architecture.full_name(stored)) is None


def test_positions_of_roberta_begin_after_the_paddings():
    architecture = of("roberta")
    assert (architecture.first_position, architecture.max_positions) == (2, 68)
    with pytest.raises(PlanError, match="68 positions"):
        architecture.check_max_length(69)
    assert of("roberta", pad_token_id=0).first_position == 1
    assert of("bert").first_position == 0


def test_peft_s_targets_are_found_in_an_encoder():
    ranks = of("bert").target_modules(LoraTerms(r=4), blocks=range(1))
    path = "bert.encoder.layer.0.attention.self"
    assert ranks == {f"{path}.query": 4, f"{path}.value": 4}
    both = of("bert").target_modules(
        LoraTerms(r=4, target_modules=("output.dense",)), blocks=range(1)
    )
    assert len(both) == 2
