"""Where the coordinator cannot write down what a device did, the run stops, not the device."""

from __future__ import annotations

import pytest

from coordinator.run_listener import RunListener
from shared.errors import StorageError
from tests.support.outcomes import trio


class FullDisk(RunListener):
    """Has no room left when the first adapters come."""

    def delivered(self, device):
        raise StorageError(f"no room for what {device} delivered")


def test_no_device_is_refused_for_it(tmp_path):
    sim = trio(tmp_path)
    sim.coordinator.members.listener = FullDisk()
    with pytest.raises(StorageError, match="no room for what"):
        sim.run()
    assert {name: device.error for name, device in sim.devices.items()} == dict.fromkeys("abc")
