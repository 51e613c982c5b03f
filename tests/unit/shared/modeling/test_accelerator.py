"""What torch takes of a GPU's memory; on the CPU there is nothing to say."""

from __future__ import annotations

import pytest
import torch

from shared.memory_use import LEAST_CONTEXT_BYTES, watched_peak
from shared.modeling.accelerator import TorchMemory, wait_for

MIB = 2**20


def test_the_cpu_is_no_accelerator():
    memory = TorchMemory(torch.device("cpu"))
    memory.restart_memory_peak()
    wait_for(torch.device("cpu"))
    assert memory.accelerator_memory() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_a_gpus_peak_has_its_context_and_what_was_freed_again():
    device = torch.device("cuda")
    memory = TorchMemory(device)
    with watched_peak(memory) as peak:
        block = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
        del block
        wait_for(device)
    used = memory.accelerator_memory()
    assert used is not None
    assert used.runtime_bytes >= LEAST_CONTEXT_BYTES
    assert peak.rise_bytes >= 64 * MIB or not used.is_own
    assert peak.start_bytes >= used.runtime_bytes
