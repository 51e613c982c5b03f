"""The file between runner and page: what was saved is loaded, and nothing else is."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from shared.errors import DataError, StorageError
from tests.support.comparisons import comparison
from tests.testbed.comparison.results import Comparison


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json"


def test_what_was_saved_is_loaded(path):
    before = comparison()
    # A NaN equals nothing; see below.
    before = replace(before, methods=tuple(run for run in before.methods if run.rounds))
    before.save(path)
    assert Comparison.load(path) == before


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_nan_again(path):
    before = comparison(seeds=1)
    first = before.methods[0]
    spoilt = replace(first.points[-1], perplexity=math.inf, loss=math.nan)
    run = replace(first, points=(*first.points[:-1], spoilt))
    Comparison(settings={"rate": math.nan}, methods=(run,)).save(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    loaded = Comparison.load(path)
    last = loaded.methods[0].points[-1]
    assert math.isnan(last.perplexity)
    assert math.isnan(last.loss)
    assert loaded.methods[0].points[:-1] == first.points[:-1]
    assert loaded.settings == {"rate": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("settings"), "settings: Field required"),
        (lambda data: data["methods"][0].update(kind="other"), "methods.0.kind: Input should be"),
        (lambda data: data["methods"][0].update(extra=1), "methods.0.extra"),
        (lambda data: data["methods"][0]["points"][3].update(seconds=None), r"points\.3\.seconds"),
        (lambda data: data["methods"][0]["points"][3].update(bytes=-1), r"points\.3\.bytes"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_place(path, change, words):
    comparison(seeds=1).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=words):
        Comparison.load(path)


def test_half_a_file_and_a_missing_one_are_told(path):
    with pytest.raises(StorageError, match="cannot be read"):
        Comparison.load(path)
    comparison(seeds=1).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="is no comparison's results"):
        Comparison.load(path)
