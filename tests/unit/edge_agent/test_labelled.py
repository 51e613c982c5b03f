"""Texts with their classes: what is taken, and what an error says of what is not."""

from __future__ import annotations

import json
import logging

import pytest

from edge_agent.labelled import labelled, warn_of_one_class
from edge_agent.records import Records
from shared.errors import DataError

CLASSES = ("not_equivalent", "equivalent")


def written(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return Records.load(path)


def row(label, **more):
    return {"text": "one", "label": label, **more}


def test_a_label_is_the_name_of_a_class_or_its_number(tmp_path):
    records = written(tmp_path, row("equivalent"), row(0), row("not_equivalent"), row(1))
    assert [one.label for one in labelled(records, CLASSES)] == [1, 0, 0, 1]


def test_where_names_are_numbers_a_number_is_a_name(tmp_path):
    records = written(tmp_path, row(1), row("2"), row(3), row(2))
    assert [one.label for one in labelled(records, ("1", "2", "3"))] == [0, 1, 2, 1]


def test_pairs_of_texts_are_kept_together(tmp_path):
    records = written(tmp_path, row(0, text_pair="two"), row(1, text_pair="three"))
    assert [(one.text, one.pair) for one in labelled(records, CLASSES)] == [
        ("one", "two"),
        ("one", "three"),
    ]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row("secret"), "none of this run's classes, which are not_equivalent, equivalent"),
        (row(2), "none of this run's classes"),
        (row(-1), "none of this run's classes"),
        (row(True), "'label' is a boolean"),
        (row(1.0), "'label' is a number"),
        (row(None), "'label' is null"),
        (row(["equivalent"]), "'label' is a list"),
        ({"text": "one"}, "has no 'text' with a 'label'"),
        (row(1, text_pair="two"), "'text_pair' is here, unlike in the lines before"),
    ],
)
def test_a_bad_label_is_an_error_with_file_line_and_reason(bad, says, tmp_path):
    records = written(tmp_path, row(0), bad)
    with pytest.raises(DataError, match=says) as caught:
        labelled(records, CLASSES)
    assert str(caught.value).startswith(f"{tmp_path / 'pairs.jsonl'}:2: ")
    assert "secret" not in str(caught.value), "a label is private"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"text": "one", "label": 0}, "'text_pair' is missing"),
        (row(1, text_pair=3), "'text_pair' is a number, not a string"),
        (row(1, text_pair=" "), "'text_pair' is empty"),
    ],
)
def test_a_bad_pair_is_an_error(bad, says, tmp_path):
    records = written(tmp_path, row(0, text_pair="two"), bad)
    with pytest.raises(DataError, match=says):
        labelled(records, CLASSES)


def test_data_for_another_task_is_refused(tmp_path):
    records = written(tmp_path, {"prompt": "one", "completion": "two"})
    with pytest.raises(DataError, match=r"pairs.jsonl:1: this run classifies texts"):
        labelled(records, CLASSES)


def test_one_class_only_is_told_but_taken(tmp_path, caplog):
    records = written(tmp_path, row(1), row("equivalent"))
    with caplog.at_level(logging.WARNING):
        warn_of_one_class(labelled(records, CLASSES), records)
    assert "all 2 records are of one class" in caplog.text
    caplog.clear()
    two = written(tmp_path, row(1), row("not_equivalent"))
    warn_of_one_class(labelled(two, CLASSES), two)
    assert not caplog.text


def test_the_columns_of_a_classification_mean_nothing_to_other_runs(tmp_path):
    """As every other column: whatever they hold."""
    records = written(tmp_path, {"text": "one", "label": {"any": 1}, "text_pair": 3})
    assert records.records[0].row["text"] == "one"


def test_nothing_of_an_example_shows_in_its_repr(tmp_path):
    records = written(tmp_path, row(1, text_pair="two"), row(0, text_pair="two"))
    shown = repr(labelled(records, CLASSES))
    assert "one" not in shown
    assert "two" not in shown
