"""JSON lines of people; what is refused, and in which words, see edge_agent/test_records.py too."""

from __future__ import annotations

import pytest

from shared import json_rows
from shared.errors import DataError

CONTENT = (
    b'\xef\xbb\xbf{"a": 1}\r\n'
    b"  \t\n"
    b'{"caf\xc3\xa9": "\xe2\x80\xa8"}\n'  # U+2028 ends a line for str.splitlines, not in JSON lines
    b'{"b": [2]}'
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(CONTENT)
    return path


def test_every_row_says_where_its_bytes_lie(path):
    with json_rows.opened(path) as file:
        found = list(json_rows.rows(file, path))
    cut = [CONTENT[row.offset : row.offset + row.size_bytes] for row in found]
    assert [row.number for row in found] == [1, 3, 4]
    assert cut == [b'{"a": 1}\r\n', b'{"caf\xc3\xa9": "\xe2\x80\xa8"}\n', b'{"b": [2]}']
    assert [row.row for row in found] == [{"a": 1}, {"café": "\u2028"}, {"b": [2]}]


def test_a_row_does_not_show_its_text(path):
    with json_rows.opened(path) as file:
        assert "caf" not in repr(list(json_rows.rows(file, path)))


def test_a_wrong_line_is_named_once_the_lines_before_it_were_read(path):
    path.write_bytes(CONTENT + b"\nnot JSON\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:5: not JSON"), json_rows.opened(path) as file:
        list(json_rows.rows(file, path))


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(DataError, match="no such file"), json_rows.opened(tmp_path / "none"):
        pass
    with pytest.raises(DataError, match="cannot be read"), json_rows.opened(tmp_path):
        pass


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "null"), ({}, "an object"), ([], "a list"), ("", "a string"), (True, "a boolean"),
     (1.5, "a number")],
)  # fmt: skip
def test_a_value_has_a_name(value, words):
    assert json_rows.kind(value) == words
