"""An aggregated round is on disk at once: what comes next may take long, or never come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from coordinator import checkpoints
from coordinator.registry import Member, Stage
from shared.errors import QuorumError
from shared.protocol.messages import DeviceId
from tests.support.closeness import relative
from tests.support.outcomes import LINES, trio
from tests.support.simulation import Simulation

ALL_OF_THEM = {"min": 3, "expected": 3, "join_timeout_s": 30}


@pytest.fixture
def short_of_one(tmp_path) -> Iterator[Simulation]:
    """A run whose first round is closed, and whose second waits for a device that is gone."""
    sim = trio(tmp_path, rules=ALL_OF_THEM)
    sim.run_to("round 1, step 2")  # both steps are closed, the adapters are on their way
    sim.devices["c"].gone = True  # not for the others: it only stands still
    sim.run(until=lambda: member(sim, "a").stage is Stage.PREPARED)
    sim.vanish("a")
    sim.run(until=lambda: member(sim, "a") is None)
    sim.devices["c"].gone = False
    sim.run_to("waiting for devices")
    yield sim
    sim.reporter.close()


def member(sim: Simulation, device: str) -> Member | None:
    found = {one.device_id: one for one in sim.coordinator.members.registry}
    return found.get(DeviceId(device))


def test_a_coordinator_killed_before_the_next_round_repeats_nothing(short_of_one):
    sim = short_of_one
    before = {module: one.total.delta_OI() for module, one in sim.model.update.items()}
    assert any(np.any(delta) for delta in before.values())
    sim.restart_coordinator()
    after = {module: one.total.delta_OI() for module, one in sim.model.update.items()}
    assert max(relative(after[module], before[module]) for module in before) == 0.0
    sim.add_device("a", lines=LINES)
    sim.run()
    trained = [line["step"] for line in sim.metrics() if "train/loss" in line]
    assert trained == list(range(1, len(trained) + 1))
    assert [line["round"] for line in sim.metrics() if "round/seconds" in line] == [1, 2]


def test_a_run_that_ends_for_want_of_devices_keeps_the_round(short_of_one):
    with pytest.raises(QuorumError, match="start more agents"):
        short_of_one.run()
    found = checkpoints.latest(short_of_one.config.run_folder / "checkpoints")
    assert found is not None
    assert found.round == 1
