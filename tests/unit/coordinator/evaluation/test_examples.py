"""What an adapter is evaluated on: prompts with all their references, or what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator import demo
from coordinator.evaluation.examples import load
from shared.errors import DataError


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_of_the_same_prompt_are_one_example_with_several_references(tmp_path):
    one = lines(
        tmp_path / "one.jsonl",
        {"prompt": "a ->", "completion": " x"},
        {"prompt": "b ->", "completion": " y", "ignored": 1},
        {"prompt": "a ->", "completion": " z"},
    )
    two = lines(tmp_path / "two.jsonl", {"prompt": "a ->", "references": [" v", " w"]})
    first, second = load([one, two])
    assert (first.prompt, first.references) == ("a ->", (" x", " z", " v", " w"))
    assert (second.prompt, second.references) == ("b ->", (" y",))
    assert (first.where, second.where) == (f"{one}:1", f"{one}:2")


def test_a_limit_counts_prompts_and_keeps_all_references_of_each(tmp_path):
    data = lines(
        tmp_path / "data.jsonl",
        *({"prompt": prompt, "completion": f" {n}"} for n, prompt in enumerate("abcab")),
    )
    assert [example.references for example in load([data], limit=2)] == [(" 0", " 3"), (" 1", " 4")]


def test_the_demos_held_out_text_can_be_evaluated_on():
    files = [shard.held_out for shard in demo.shards()]
    found = load(files)
    assert sum(len(example.references) for example in found) == 144
    assert len(found) == len({example.prompt for example in found})
    assert all(example.prompt.endswith(" ->") for example in found)


def test_the_challenges_csv_is_read_with_its_references(tmp_path):
    path = tmp_path / "devset.csv"
    path.write_text(
        "\ufeffmr,ref\n"
        '"name[A], area[riverside]","A is by the river, isn\'t it."\n'
        '"name[B]","B ""the best"""\n'
        '"name[A], area[riverside]",There is A.\n',
        encoding="utf-8",
    )
    first, second = load([path])
    assert first.prompt == "name : A | area : riverside ->"
    assert first.references == (" A is by the river , isn 't it .", " There is A .")
    assert second.references == (' B " the best "',)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"completion": "x"}, "column 'prompt' is missing"),
        ({"text": "x"}, "column 'prompt' is missing"),
        ({"prompt": "a"}, "this line has neither"),
        ({"prompt": "a", "completion": "b", "references": ["c"]}, "'completion', 'references'"),
        ({"prompt": "a", "references": []}, "'references' is not a list with texts"),
        ({"prompt": "a", "references": "b"}, "'references' is not a list with texts"),
        ({"prompt": "a", "references": ["b", 3]}, "a reference is a number, not a string"),
        ({"prompt": " ", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a", "completion": "\ud800"}, "half of a surrogate pair"),
        (["a"], "not a JSON object but a list"),
    ],
)
def test_a_wrong_line_is_named_with_what_to_do(tmp_path, row, part):
    data = lines(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(DataError, match=f"{data}:2: .*{part}"):
        load([data])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", r":1: the E2E challenge's csv has the columns 'mr' and 'ref'"),
        ("prompt,completion\na,b\n", r":1: the E2E challenge's csv has the columns"),
        ("mr,ref\nname[A]\n", "row 1 has 1 columns, the header 2"),
        ("mr,ref\nname[A],x\nA,x\n", "row 2: 'mr' is not of the form"),
        ("mr,ref\nname[A],\n", "row 1: 'ref' is empty"),
        ('mr,ref\nname[A],"x\n', "not csv"),
        ("mr,ref\nname[A],caf\udce9\n", "not UTF-8"),
    ],
)
def test_a_wrong_csv_is_named_with_what_to_do(tmp_path, text, part):
    path = tmp_path / "devset.csv"
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(DataError, match=part) as caught:
        load([path])
    assert str(path) in str(caught.value)


def test_nothing_to_evaluate_on_is_said(tmp_path):
    empty = lines(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: no lines; put one JSON object per line"):
        load([empty])
    header = tmp_path / "only.csv"
    header.write_text("mr,ref\n")
    with pytest.raises(DataError, match="no lines"):
        load([header])
    for name in ("nowhere.jsonl", "nowhere.csv"):
        with pytest.raises(DataError, match="no such file; check the path"):
            load([tmp_path / name])
