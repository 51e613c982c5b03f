"""For all tests: fixed seeds and one torch thread, without importing torch for those without it."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest

# Before any import of torch: the test machine's cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Close after every test what the devices of its simulations hold open."""
    yield
    simulation = sys.modules.get("tests.support.simulation")
    if simulation is not None:
        simulation.close_caches()


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Give every test the same global seeds, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002: foreign code may draw from the global generator
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
