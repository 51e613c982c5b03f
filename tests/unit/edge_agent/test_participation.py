"""Labels are text: they leave a device only where its owner said so."""

from __future__ import annotations

import pytest

from shared.errors import RefusedError
from tests.support.simulation import Simulation


def simulated(folder, *, labels="server", share_labels) -> Simulation:
    settings = {
        "devices": {"min": 1, "expected": 1, "wait_s": 0},
        "rounds": {"count": 1, "steps": 1},
        "plan": {"batch": 2, "split_layer": 1},
        "lora": {"r": 2},
        "training": {"labels": labels, "max_length": 32},
    }
    return Simulation(folder, settings=settings, share_labels=share_labels)


def test_a_run_that_wants_labels_is_refused_unless_the_owner_agreed(tmp_path):
    sim = simulated(tmp_path, share_labels=False)
    device = sim.add_device("nano")
    sim.run(until=lambda: device.error is not None, limit_s=60)
    sim.reporter.close()
    assert isinstance(device.error, RefusedError)
    for words in ("labels: server", "would be sent to the coordinator", "--share-labels"):
        assert words in str(device.error)
    kinds = {name.rsplit("/", 1)[-1] for name, _ in sim.broker.traffic}
    assert kinds <= {"status", "requests", "commands"}, "no tensor has left"


def test_an_owner_who_agreed_is_told_all_the_same(tmp_path, caplog):
    sim = simulated(tmp_path, share_labels=True)
    device = sim.add_device("nano")
    sim.run()
    assert device.error is None
    (told,) = [r for r in caplog.records if r.name == "edge_agent.participation"
               and r.levelname == "WARNING"]  # fmt: skip
    assert "the tokens to predict, which are this device's text" in told.getMessage()


@pytest.mark.parametrize("share_labels", [False, True])
def test_a_run_with_labels_on_the_device_needs_no_consent(tmp_path, caplog, share_labels):
    sim = simulated(tmp_path, labels="device", share_labels=share_labels)
    device = sim.add_device("nano")
    sim.run()
    assert device.error is None
    assert "labels: server" not in caplog.text
