"""What the demo ships is there, fits together, and is small."""

from __future__ import annotations

from coordinator import demo
from coordinator.model_store import ModelStore
from edge_agent.records import Records


def test_each_device_has_text_of_its_own_in_unequal_amounts():
    loaded = [(Records.load(s.training), Records.load(s.held_out)) for s in demo.shards()]
    assert [(len(training), len(held)) for training, held in loaded] == [
        (1200, 48),
        (1000, 48),
        (800, 48),
    ]
    assert {records.format for both in loaded for records in both} == {"prompt"}


def test_no_held_out_meaning_is_trained_on_by_any_device():
    trained = {r.row["prompt"] for s in demo.shards() for r in Records.load(s.training).records}
    held = {r.row["prompt"] for s in demo.shards() for r in Records.load(s.held_out).records}
    assert not trained & held


def test_the_base_opens_and_all_is_below_nine_megabytes(tmp_path):
    store = ModelStore.open(str(demo.base_folder()), cache_folder=tmp_path)
    assert store.architecture.block_count == 6
    folder = demo.base_folder().parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 9_000_000
    assert "CC BY-SA 4.0" in (folder / "SOURCES.md").read_text(encoding="utf-8")
