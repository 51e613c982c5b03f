"""The device's own text, before it joins: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import records
from edge_agent.records import Record, Records
from shared.errors import DataError

SECRET = "Prometheus"  # stands for private text: no message may hold it
GOOD = json.dumps({"text": SECRET})


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "my.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def some(count: int) -> Records:
    rows = tuple(Record(line, {"text": str(line)}) for line in range(1, count + 1))
    return Records(Path("my.jsonl"), "text", rows)


@pytest.mark.parametrize(
    ("row", "format_"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]},
         "messages"),
    ],
)  # fmt: skip
def test_each_format_is_recognised_and_other_columns_are_ignored(tmp_path, row, format_):
    loaded = Records.load(write(tmp_path, json.dumps({"id": 7, **row})))
    assert loaded.format == format_
    assert loaded.records[0].row == row


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_harmless(tmp_path):
    content = b"\xef\xbb\xbf" + b'{"text": "one"}\r\n\r\n  \n{"text": "caf\xc3\xa9"}'
    loaded = Records.load(write(tmp_path, content))
    assert [(r.line, r.row["text"]) for r in loaded.records] == [(1, "one"), (4, "café")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f'{{"text": "{SECRET}"', "not JSON"),
        (f'"{SECRET}"', "not a JSON object but a string"),
        (f'["{SECRET}"]', "not a JSON object but a list"),
        ("17", "not a JSON object but a number"),
        (f'{{"{SECRET}": 1}}', "has none of the columns"),
        (f'{{"completion": "{SECRET}"}}', "'prompt' is missing"),
        (f'{{"prompt": "{SECRET}"}}', "'completion' is missing"),
        ('{"text": null}', "'text' is null, not a string"),
        ('{"text": true}', "'text' is a boolean"),
        ('{"text": " \\n"}', "'text' is empty"),
        (f'{{"prompt": "{SECRET}", "completion": ""}}', "'completion' is empty"),
        (f'{{"prompt": "", "completion": "{SECRET}"}}', "'prompt' is empty"),
        (f'{{"text": "{SECRET}", "prompt": "x"}}', "has 'text' and 'prompt'"),
        (f'{{"prompt": "{SECRET}", "completion": "x"}}', "is of the format 'prompt', line 1"),
        (f'{{"text": "{SECRET} \\ud800"}}', "half of a surrogate pair"),
        ('{"messages": []}', "not a list with messages in it"),
        (f'{{"messages": ["{SECRET}"]}}', "message 1 is a string"),
        (f'{{"messages": [{{"content": "{SECRET}"}}]}}', "message 1 has no 'role'"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no 'content'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "'content' is a number"),
        (f'{{"messages": [{{"role": "user", "content": "{SECRET}"}}]}}', "nothing to learn"),
        ("[" * 100_000, "too deep"),
        ('{"text": ' + "9" * 5000 + "}", "number too long"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason_but_never_with_its_text(
    tmp_path, line, words
):
    path = write(tmp_path, f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        Records.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert words in message
    assert SECRET not in message
    assert caught.value.__cause__ is None  # a decoding error would carry the line along


def test_bytes_that_are_not_utf_8_are_named_with_their_line(tmp_path):
    path = write(tmp_path, GOOD.encode() + b'\n{"text": "caf\xe9"}')
    with pytest.raises(DataError, match=r"my\.jsonl:2: not UTF-8 at byte 14 of the line"):
        Records.load(path)


def test_a_utf_16_file_is_called_one(tmp_path):
    with pytest.raises(DataError, match="UTF-16; save it as UTF-8"):
        Records.load(write(tmp_path, GOOD.encode("utf-16")))


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_a_file_without_records_is_refused(tmp_path, content):
    with pytest.raises(DataError, match="no records; put one JSON object per line"):
        Records.load(write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Records.load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        Records.load(tmp_path)


def test_no_text_shows_when_records_are_printed(tmp_path):
    loaded = Records.load(write(tmp_path, GOOD))
    assert SECRET not in repr(loaded)
    assert SECRET not in repr(loaded.records[0])


@given(count=st.integers(2, 60), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**31 - 1))
def test_a_split_is_disjoint_complete_repeatable_and_never_empty(count, fraction, seed):
    training, held_out = some(count).split(fraction, seed=seed)
    lines = [r.line for part in (training, held_out) for r in part.records]
    assert sorted(lines) == list(range(1, count + 1))
    assert len(training) >= 1
    assert len(held_out) >= 1
    assert (training, held_out) == some(count).split(fraction, seed=seed)


def test_one_record_alone_is_trained_on_and_nothing_is_held_out(tmp_path):
    loaded = records.load(write(tmp_path, GOOD), evaluation_data=None, evaluation_fraction=0.5)
    assert len(loaded.training) == 1
    assert loaded.held_out is None


def test_a_file_of_its_own_is_held_out_whole(tmp_path):
    path = write(tmp_path, f"{GOOD}\n{GOOD}\n")
    other = tmp_path / "held-out.jsonl"
    other.write_text(GOOD)
    loaded = records.load(path, evaluation_data=other, evaluation_fraction=0.5)
    assert len(loaded.training) == 2
    assert loaded.held_out is not None
    assert loaded.held_out.path == other
