"""Where torch computes is said and checked, and a full memory is told with what to lower."""

from __future__ import annotations

import pytest
import torch

from edge_agent.backends import open_backend
from shared.errors import ConfigError, PlanError
from shared.modeling.compute import compute_device, explained_out_of_memory

HAS_CUDA = torch.cuda.is_available()


def test_without_a_wish_it_is_the_gpu_where_there_is_one():
    assert compute_device(None).type == ("cuda" if HAS_CUDA else "cpu")
    assert compute_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["cuda:99", pytest.param("cuda", marks=pytest.mark.skipif(
    HAS_CUDA, reason="there is one here"))])  # fmt: skip
def test_a_gpu_that_is_not_there_is_a_wrong_setting(wanted):
    with pytest.raises(ConfigError, match=rf"device {wanted} is not there: .* choose device: cpu"):
        open_backend("torch", device=wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no GPU here")
def test_the_memory_of_a_gpu_that_is_full_is_told():
    with pytest.raises(PlanError, match="lower plan.micro_batch"), explained_out_of_memory("it"):
        torch.empty(1 << 45, device="cuda")


def test_a_full_memory_is_told_with_what_to_lower():
    with pytest.raises(PlanError) as raised, explained_out_of_memory("this device"):
        torch.empty(1 << 60, dtype=torch.uint8)
    for words in ("this device is out of memory", "plan.micro_batch", "plan.in_flight",
                  "training.max_length", "can't allocate memory"):  # fmt: skip
        assert words in str(raised.value)


def test_the_gpus_own_error_is_told_the_same_way():
    with pytest.raises(PlanError, match="CUDA out of memory"), explained_out_of_memory("it"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it")


def test_any_other_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes") as raised, explained_out_of_memory("it"):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(raised.value, PlanError)
