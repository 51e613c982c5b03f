"""Files of shards: what is in them, and what is refused before anything is written."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from coordinator import shard_files
from coordinator.shard_files import as_table, device_names, shard
from coordinator.sharding import Rule
from shared.errors import ConfigError, DataError, StorageError
from tests.testbed.in_process import coordinator_main

ABC = ("ada", "bob", "cyd")
ROWS = [
    b'{"text": "one",   "label": "red"}\n',
    b'{"label":"red","text":"caf\xc3\xa9 \\u00e9"}\r\n',
    b'\t{"prompt": "p", "completion": "c", "label": 3, "other": [1.50, 1e2]} \n',
    b'{"messages": [{"role": "user", "content": "?"}], "label": true}\n',
    b'{"text_a": "a", "text_b": "b", "label": "blue"}\n',
    b'{"text": "last", "label": "blue"}',
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ROWS[0] + b"\n" + b"".join(ROWS[1:]))
    return path


@pytest.fixture
def to(tmp_path):
    return tmp_path / "shards"


def iid(**given):
    return Rule(devices=ABC, by="iid", **given)


def test_lines_are_copied_byte_for_byte_and_each_once(data, to):
    shards = shard(data, to, rule=iid())
    lines = [line for name in ABC for line in (to / f"{name}.jsonl").read_bytes().splitlines(True)]
    assert sorted(lines) == sorted([*ROWS[:-1], ROWS[-1] + b"\n"])
    assert [(one.device, one.records) for one in shards] == [(name, 2) for name in ABC]
    assert {path.name for path in to.iterdir()} == {*(f"{n}.jsonl" for n in ABC), "shards.json"}


def test_the_lines_of_a_device_are_in_the_order_of_the_file(tmp_path, to):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(100)))
    shard(path, to, rule=iid())
    numbers = [json.loads(line)["n"] for line in (to / "ada.jsonl").read_text().splitlines()]
    assert numbers == sorted(numbers)
    assert len(numbers) >= 33


def test_what_was_done_is_written_beside_the_shards(data, to):
    rule = Rule(devices=("ada", "bob"), by="label", alpha=1.5, seed=4, min_records=2)
    shard(data, to, rule=rule, column="label")
    found = json.loads((to / "shards.json").read_text())
    assert found["input"] == {
        "name": "rows.jsonl",
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "records": 6,
    }
    assert found["arguments"] == {
        "devices": ["ada", "bob"],
        "by": "label",
        "column": "label",
        "alpha": 1.5,
        "sizes": None,
        "seed": 4,
        "min_records": 2,
    }
    for name, of in found["devices"].items():
        rows = [json.loads(line) for line in (to / f"{name}.jsonl").read_bytes().splitlines()]
        labels = [row["label"] for row in rows]
        assert of["records"] == len(labels)
        assert of["classes"] == {str(label).lower(): labels.count(label) for label in labels}


def test_equal_arguments_make_equal_folders(data, tmp_path):
    for name in ("one", "two"):
        shard(data, tmp_path / name, rule=Rule(devices=ABC, by="label", seed=1))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_by_label_the_column_is_called_label_where_none_is_named(data, to):
    shards = shard(data, to, rule=Rule(devices=ABC, by="label"))
    assert sum(sum(one.classes.values()) for one in shards) == 6


def test_other_splits_need_no_column_and_count_the_one_they_are_given(data, to, tmp_path):
    assert all(not one.classes for one in shard(data, to, rule=iid()))
    counted = shard(data, tmp_path / "counted", rule=iid(), column="label")
    assert sum(one.classes.get("red", 0) for one in counted) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            b'{"text": "a"}',
            r"rows\.jsonl:8: column 'label' is missing, there is 'text'; .*--column",
        ),
        (b"{}", "there is no column at all"),
        (b'{"label": null}', r":8: column 'label' is null"),
        (b'{"label": ["a"]}', "'label' is a list; a class is a string"),
        (b'{"label": "caf\xe9"}', r":8: not UTF-8 at byte 15"),
        (b"label: red", r":8: not JSON"),
        (b"[1]", r":8: not a JSON object but a list"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_written(data, to, line, words):
    data.write_bytes(data.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=words):
        shard(data, to, rule=Rule(devices=ABC, by="label"))
    assert [path.name for path in to.parent.iterdir()] == ["rows.jsonl"]


def test_an_empty_file_and_a_missing_one_are_told(data, to):
    data.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="no records"):
        shard(data, to, rule=iid())
    with pytest.raises(DataError, match="no such file"):
        shard(data.with_name("none.jsonl"), to, rule=iid())


def test_fewer_records_than_devices_are_told(data, to):
    with pytest.raises(DataError, match="6 records are too few for 7 devices"):
        shard(data, to, rule=Rule(devices=device_names("7"), by="iid"))
    assert not to.exists()


def test_a_folder_with_something_in_it_is_left_alone(data, to):
    to.mkdir()
    shard(data, to, rule=iid())  # an empty one is as good as none
    before = (to / "ada.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds an earlier split; remove it, or name another"):
        shard(data, to, rule=iid(seed=1))
    assert (to / "ada.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="holds other files"):
        shard(data, data.parent, rule=iid())
    with pytest.raises(ConfigError, match="is a file"):
        shard(data, data, rule=iid())


def test_a_file_that_changes_meanwhile_makes_no_shards(data, to, monkeypatch):
    """Its lines may have moved after it was seen where they lie."""
    split = shard_files.split

    def changed(*given):
        with data.open("ab") as file:
            file.write(b"\n{}\n")
        return split(*given)

    monkeypatch.setattr(shard_files, "split", changed)
    with pytest.raises(DataError, match="changed while it was read; try again"):
        shard(data, to, rule=iid())
    assert not to.exists()


def test_a_folder_that_cannot_be_written_is_told(data):
    with pytest.raises(StorageError, match="cannot write"):
        shard(data, data / "in-a-file", rule=iid())


def test_a_column_that_is_no_class_is_warned_of(tmp_path, to, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"label": "{n}\\n text"}}\n' for n in range(30)))
    shards = shard(path, to, rule=Rule(devices=ABC, by="label"))
    assert "'label' has 30 values in 30 records" in caplog.text
    assert len(as_table(shards).splitlines()) == 4, "whatever is in a class's name"


def test_devices_are_named_or_counted():
    assert device_names("3") == ("device-1", "device-2", "device-3")
    assert device_names("10")[:2] == ("device-01", "device-02")
    assert device_names("nano,orin-2") == ("nano", "orin-2")
    for wrong in ("0", "100001", "999999999999"):
        with pytest.raises(ConfigError, match="devices"):
            device_names(wrong)
    for wrong in ("a,", "a/b", "../a", "", " a", "a\n", "é"):
        with pytest.raises(ConfigError, match="is no device's name"):
            device_names(wrong)


def test_the_command_writes_shards_and_a_table(data, to):
    ended = coordinator_main(
        *("shard", str(data), "--to", str(to), "--devices", "ada,bob", "--by", "size"),
        *("--sizes", "2,1", "--column", "label"),
    )
    assert ended.code == 0
    assert re.search(r"(?m)^device +records +share +classes$", ended.output)
    assert re.search(r"(?m)^ada +4 +66\.7% ", ended.output)
    assert (to / "bob.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--by", "label", "--column", "none"), DataError.exit_code, "column 'none' is missing"),
        (("--by", "label", "--alpha", "0"), ConfigError.exit_code, "must be above 0"),
        (("--by", "size", "--sizes", "1,x"), 2, "not of the form 5,3,1"),
        (("--by", "luck"), 2, "invalid choice"),
    ],
)
def test_the_command_says_what_is_wrong(data, to, flags, code, words):
    ended = coordinator_main("shard", str(data), "--to", str(to), "--devices", "3", *flags)
    assert (ended.code, words in ended.words) == (code, True), ended.words
    assert not to.exists()
