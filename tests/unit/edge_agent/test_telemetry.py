"""Readings for heartbeats: not too often, from any thread, and never in a heartbeat's way."""

from __future__ import annotations

import logging
import threading

from edge_agent.telemetry import TELEMETRY_EVERY_S, PacedTelemetry
from shared.protocol.profile import Telemetry
from tests.support.fake_clock import FakeClock


class Thermometer:
    """Counts its readings; fails, or waits for its test, where it is told to."""

    def __init__(self):
        self.readings = 0
        self.broken = False
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def read(self):
        self.readings += 1
        self.entered.set()
        assert self.go_on.wait(timeout=30)
        if self.broken:
            raise OSError("the sensor fell off")
        return Telemetry(temperature_c=float(self.readings))


def test_the_first_is_due_at_once_and_the_next_ten_seconds_later():
    clock, sensor = FakeClock(), Thermometer()
    telemetry = PacedTelemetry(sensor.read, clock)
    assert telemetry.due() == Telemetry(temperature_c=1.0)
    clock.advance(TELEMETRY_EVERY_S - 0.1)
    assert telemetry.due() is None
    clock.advance(0.1)
    assert telemetry.due() == Telemetry(temperature_c=2.0)
    assert telemetry.due() is None
    assert sensor.readings == 2


def test_who_finds_another_thread_reading_goes_on_without():
    clock, sensor = FakeClock(), Thermometer()
    telemetry = PacedTelemetry(sensor.read, clock)
    sensor.go_on.clear()
    found = []
    slow = threading.Thread(target=lambda: found.append(telemetry.due()))
    slow.start()
    assert sensor.entered.wait(timeout=30)
    clock.advance(2 * TELEMETRY_EVERY_S)
    assert telemetry.due() is None, "and at once, for this thread has a heartbeat to send"
    sensor.go_on.set()
    slow.join(timeout=30)
    assert found == [Telemetry(temperature_c=1.0)]
    assert telemetry.due() == Telemetry(temperature_c=2.0)


def test_a_sensor_that_fails_is_warned_of_once_and_asked_again_later(caplog):
    clock, sensor = FakeClock(), Thermometer()
    telemetry = PacedTelemetry(sensor.read, clock)
    sensor.broken = True
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert telemetry.due() is None
            clock.advance(TELEMETRY_EVERY_S)
    assert sensor.readings == 3
    (record,) = caplog.records
    assert "the sensor fell off" in record.getMessage()
    sensor.broken = False
    assert telemetry.due() == Telemetry(temperature_c=4.0)
