"""Checkpoints: what is written comes back, and what was torn is passed over."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation import SERVER, ModuleUpdate, Sole
from coordinator.atomic_folder import replacing
from coordinator.checkpoints import Checkpoint, latest, load, save
from shared.adapters import FactoredDelta, LoraPair, ModuleAdapter
from shared.errors import StorageError

FRONT, BACK = "transformer.h.0.attn.c_attn", "transformer.h.11.mlp.c_proj"
FILES = (
    "update.safetensors",
    "server.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)


def delta(seed: int, rank: int) -> FactoredDelta:
    random = np.random.default_rng(seed)
    u_OR, _ = np.linalg.qr(random.standard_normal((12, rank)))
    v_IR, _ = np.linalg.qr(random.standard_normal((8, rank)))
    return FactoredDelta(u_OR, np.sort(random.uniform(size=rank))[::-1], v_IR.T)


def pair(seed: int, rank: int) -> LoraPair:
    random = np.random.default_rng(seed)
    a_RI = random.standard_normal((rank, 8)).astype(np.float32)
    return LoraPair(a_RI, random.standard_normal((12, rank)).astype(np.float32), 4 / 3)


def checkpoint(round_: int = 1) -> Checkpoint:
    total = delta(round_, 4)
    return Checkpoint(
        round=round_,
        step=20 * round_,
        update={
            FRONT: ModuleUpdate(total, total),
            BACK: ModuleUpdate(total, delta(99, 3), Sole(SERVER, 3, 4 / 3)),
        },
        server={
            BACK: ModuleAdapter(pair(1, 3), pair(2, 5)),
            FRONT: ModuleAdapter(pair(3, 0)),
        },
        optimizer={"m": np.arange(6, dtype=np.float32).reshape(2, 3).T, "step": np.array(40)},
        state={"plan": {"nano": {"split_layer": 2, "ranks": {FRONT: 4}}}, "loss": [1.5, None]},
    )


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.round, one.step, one.state) == (other.round, other.step, other.state)
    assert set(one.update) == set(other.update)
    for module, update in one.update.items():
        twin = other.update[module]
        assert update.sole == twin.sole
        for left, right in ((update.total, twin.total), (update.handed, twin.handed)):
            for name in ("u_OR", "s_R", "vt_RI"):
                assert_identical(getattr(left, name), getattr(right, name))
    assert set(one.server) == set(other.server)
    for module, adapter in one.server.items():
        for left, right in (
            (adapter.trainable, other.server[module].trainable),
            (adapter.frozen, other.server[module].frozen),
        ):
            assert (left is None) == (right is None)
            if left is not None and right is not None:
                assert left.scaling == right.scaling
                assert_identical(left.a_RI, right.a_RI)
                assert_identical(left.b_OR, right.b_OR)
    assert set(one.optimizer) == set(other.optimizer)
    for name, array in one.optimizer.items():
        assert_identical(array, other.optimizer[name])


def assert_identical(left: np.ndarray, right: np.ndarray) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    np.testing.assert_array_equal(left, right)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    path = save(tmp_path / "checkpoints", checkpoint(12), keep=3)
    assert path == tmp_path / "checkpoints" / "round-000012"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    assert_same(load(path), checkpoint(12))
    assert_same(latest(tmp_path / "checkpoints"), checkpoint(12))


def test_the_newest_checkpoints_are_kept(tmp_path):
    for round_ in range(1, 6):
        save(tmp_path, checkpoint(round_), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000004", "round-000005"]


def test_a_round_that_is_repeated_replaces_its_checkpoint(tmp_path):
    for round_ in (1, 2, 3):
        save(tmp_path, checkpoint(round_), keep=9)
    save(tmp_path, checkpoint(2), keep=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000001", "round-000002"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty, Path.unlink])
def test_a_damaged_file_sends_us_back_to_the_checkpoint_before(tmp_path, caplog, name, damage):
    save(tmp_path, checkpoint(1), keep=3)
    damage(save(tmp_path, checkpoint(2), keep=3) / name)
    with caplog.at_level(logging.WARNING):
        found = latest(tmp_path)
    assert_same(found, checkpoint(1))
    assert "round-000002" in caplog.text


def test_a_format_of_another_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.checkpoints.FORMAT", 7)
    path = save(tmp_path, checkpoint(1), keep=3)
    monkeypatch.undo()
    with pytest.raises(StorageError, match="format 7, this hsplit reads 1"):
        load(path)


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    """The kernel's own limit: a write beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_says_what_to_do_and_leaves_the_older_ones(tmp_path):
    save(tmp_path, checkpoint(1), keep=1)
    with (
        pytest.raises(StorageError, match=r"round-000002: .*free some space"),
        no_file_larger_than(1000),
    ):
        save(tmp_path, checkpoint(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]
    assert_same(latest(tmp_path), checkpoint(1))


def test_what_a_killed_program_left_behind_is_not_in_the_way(tmp_path):
    save(tmp_path, checkpoint(1), keep=3)
    torn = tmp_path / ".round-000002.new"
    torn.mkdir()
    (torn / "update.safetensors").write_bytes(b"half")
    assert_same(latest(tmp_path), checkpoint(1))
    assert_same(load(save(tmp_path, checkpoint(2), keep=3)), checkpoint(2))
    assert not torn.exists()


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path):
    target = tmp_path / "adapter"
    with replacing(target) as fresh:
        (fresh / "a").write_text("old")

    def fail_half_way() -> None:
        with replacing(target) as fresh:
            (fresh / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_state_that_json_cannot_carry_is_refused_before_anything_is_written(tmp_path):
    bad = checkpoint(1)
    state = Checkpoint(
        round=1, step=1, update=bad.update, server={}, optimizer={}, state={"x": float("nan")}
    )
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, state, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_on_disk_is_a_pickle(tmp_path):
    path = save(tmp_path, checkpoint(1), keep=1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((path / "state.json").read_text())["round"] == 1


def test_a_classifier_is_kept_and_is_a_file_only_where_there_is_one(tmp_path):
    weights = {"score.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with_one = save(tmp_path, dataclasses.replace(checkpoint(), classifier=weights), keep=3)
    np.testing.assert_array_equal(
        load(with_one).classifier["score.weight"], weights["score.weight"]
    )
    without = save(tmp_path, checkpoint(2), keep=3)
    assert not load(without).classifier
    assert not (without / "classifier.safetensors").exists()
    damaged = with_one / "classifier.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="classifier.safetensors is damaged"):
        load(with_one)
