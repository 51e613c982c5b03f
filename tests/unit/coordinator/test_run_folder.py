"""A run's folder: who may use it, and what it goes on from."""

from __future__ import annotations

import pytest

from coordinator import checkpoints, run_folder
from coordinator.aggregation import initial
from coordinator.checkpoints import Checkpoint
from coordinator.settings import CoordinatorSettings
from shared.errors import ConfigError, StorageError


def settings(folder, **run):
    return CoordinatorSettings(
        run={"folder": folder, **run},
        model={"name": "org/model"},
        rounds={"count": 4, "steps": 5},
    )


def checkpoint(*, round_: int = 2, step: int = 10, base: str = "abc") -> Checkpoint:
    return Checkpoint(
        round=round_,
        step=step,
        update=initial({"h.0.x": (4, 4)}),
        server={},
        optimizer={},
        state={"base": base},
    )


def test_a_second_coordinator_is_kept_out_of_the_folder(tmp_path):
    with run_folder.locked(tmp_path / "run"):
        second = run_folder.locked(tmp_path / "run")
        with pytest.raises(ConfigError, match="another coordinator is at work"):
            second.__enter__()
    with run_folder.locked(tmp_path / "run"):
        pass


def test_a_run_is_not_begun_over_another(tmp_path):
    checkpoints.save(tmp_path / run_folder.CHECKPOINTS, checkpoint(), keep=3)
    with pytest.raises(ConfigError, match="--resume"):
        run_folder.opened(tmp_path, resume=False)
    found = run_folder.opened(tmp_path, resume=True)
    assert found is not None
    assert found.round == 2


def test_damaged_checkpoints_are_neither_overwritten_nor_forgotten(tmp_path):
    saved = checkpoints.save(tmp_path / run_folder.CHECKPOINTS, checkpoint(), keep=3)
    (saved / "state.json").write_text("{")
    with pytest.raises(ConfigError, match="exists"):
        run_folder.opened(tmp_path, resume=False)
    with pytest.raises(StorageError, match="none of the checkpoints"):
        run_folder.opened(tmp_path, resume=True)


def test_resuming_without_a_checkpoint_begins(tmp_path):
    assert run_folder.opened(tmp_path, resume=True) is None


def test_without_an_id_the_latest_run_on_the_model_is_resumed(tmp_path):
    for name in ("20260101-000000-model", "20260102-000000-model", "20260103-000000-other"):
        (tmp_path / name / run_folder.CHECKPOINTS).mkdir(parents=True)
    (tmp_path / "20260104-000000-model").mkdir()
    assert run_folder.with_last_run(settings(tmp_path)).run_id == "20260102-000000-model"
    assert run_folder.with_last_run(settings(tmp_path, id="mine")).run_id == "mine"
    assert run_folder.with_last_run(settings(tmp_path / "none")).run.id is None


def test_a_checkpoint_of_other_weights_or_another_grid_is_refused(tmp_path):
    wanted = settings(tmp_path, id="mine")
    run_folder.check_fits(checkpoint(), wanted, base="abc")
    with pytest.raises(ConfigError, match="other weights"):
        run_folder.check_fits(checkpoint(), wanted, base="def")
    with pytest.raises(ConfigError, match="rounds.steps cannot be 5"):
        run_folder.check_fits(checkpoint(step=20), wanted, base="abc")
