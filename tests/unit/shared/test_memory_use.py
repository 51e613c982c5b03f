"""Peaks of this process's memory, as the kernel counts them and as a thread samples them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shared import memory_use
from shared.errors import ConfigError
from shared.memory_use import (
    AcceleratorMemory,
    resident_bytes,
    total_bytes,
    watched_peak,
)

MIB = 2**20
SIZE = 64 * MIB
ABOUT = 0.95 * SIZE
"""The kernel counts in pages and by processor, and other memory may be freed meanwhile."""


class Cpu:
    """Computes on no accelerator."""

    def restart_memory_peak(self) -> None:
        pass

    def accelerator_memory(self) -> AcceleratorMemory | None:
        return None


class Gpu:
    """Has so much memory in use."""

    def __init__(self, *, is_own: bool) -> None:
        self.is_own = is_own
        self.restarts = 0

    def restart_memory_peak(self) -> None:
        self.restarts += 1

    def accelerator_memory(self) -> AcceleratorMemory | None:
        return AcceleratorMemory(10 * MIB, 30 * MIB, 400 * MIB, is_own=self.is_own)


def test_what_is_freed_before_the_end_is_in_the_peak():
    with watched_peak(Cpu()) as peak:
        block = bytearray(SIZE)
        del block
    assert ABOUT <= peak.rise_bytes < 1.5 * SIZE


def test_what_came_and_went_before_is_not_in_the_peak():
    block = bytearray(SIZE)
    del block
    with watched_peak(Cpu()) as peak:
        pass
    assert peak.rise_bytes < SIZE / 4


def test_where_the_kernel_does_not_start_anew_the_end_is_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_use, "_CLEAR_REFS", tmp_path / "read-only" / "clear_refs")
    with watched_peak(Cpu()) as peak:
        block = bytearray(SIZE)
    assert peak.rise_bytes >= ABOUT
    del block


def test_a_sampler_sees_what_is_freed_again():
    before = resident_bytes()
    with memory_use._Sampler() as sampler:
        block = bytearray(SIZE)
        deadline_s = time.monotonic() + 10
        while sampler.peak_bytes < before + ABOUT and time.monotonic() < deadline_s:
            pass
        del block
    assert sampler.peak_bytes >= before + ABOUT


def test_an_accelerators_own_memory_counts_alone_with_its_context():
    gpu = Gpu(is_own=True)
    assert total_bytes(gpu) == 410 * MIB
    with watched_peak(gpu) as peak:
        block = bytearray(SIZE)
    del block
    assert (peak.start_bytes, peak.peak_bytes) == (410 * MIB, 430 * MIB)
    assert gpu.restarts == 1


def test_an_accelerator_in_the_machines_memory_adds_to_the_process():
    with watched_peak(Gpu(is_own=False)) as peak:
        block = bytearray(SIZE)
    del block
    assert peak.peak_bytes >= 430 * MIB + ABOUT
    assert peak.rise_bytes >= 20 * MIB + ABOUT


def test_a_system_without_proc_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(memory_use, "_STATUS", Path("/nowhere/status"))
    with pytest.raises(ConfigError, match="needs Linux"):
        resident_bytes()
