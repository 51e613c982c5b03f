"""The server measures its own part of the work, with the real trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coordinator.server_measuring import ServerWork, measure_server
from shared.clock import SystemClock
from shared.costs import fit
from shared.errors import ModelError, PlanError
from shared.memory_use import resident_bytes, trim
from shared.protocol.profile import Measurements
from shared.terms import LabelMode, LoraTerms, OptimizerTerms, TrainingTerms
from tests.support.cpu_clock import CpuClock
from tests.support.tiny_models import FAMILIES, TinyModel, tiny_model

HEAD_BYTES = 16 * 2**20


def work(model: TinyModel, labels: LabelMode = "device", **changes: Any) -> ServerWork:
    exact: dict[str, Any] = {
        "config": model.config,
        "tensors": model.tensors,
        "training": TrainingTerms(max_length=32, labels=labels),
        "lora": LoraTerms(r=4),
        "optimizer": OptimizerTerms(),
        "micro_batch": 4,
        "length": 16,
        "device": "cpu",
    }
    return ServerWork(**{**exact, **changes})


def measured(work: ServerWork) -> Measurements:
    # Compared below are seconds of work, which others on this machine must not lengthen.
    return measure_server(work, CpuClock(), budget_s=0.3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", ["device", "server"])
def test_every_family_is_measured_in_both_label_modes(family, labels):
    model = tiny_model(family)
    found = measured(work(model, labels))
    points = [(p.blocks, p.sequences * p.length, p.in_flight) for p in found.blocks]
    assert points == [(1, 16, 1), (1, 64, 1), (3, 16, 1), (3, 64, 1), (3, 64, 2)]
    assert [p.tokens for p in found.head] == ([64, 16] if labels == "server" else [])
    assert len({p.adapter_parameters for p in found.optimizer}) == 2
    assert found.model == model.architecture.fingerprint
    assert found.threads == torch.get_num_threads()
    assert not found.on_gpu
    costs = fit(found)
    few, many = (costs.backward_s(blocks=k, tokens=64, adapter_parameters=1000) for k in (1, 3))
    assert many > few > 0
    assert (costs.head_s(tokens=64) > 0) == (labels == "server")


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
@pytest.mark.parametrize("labels", ["device", "server"])
def test_a_classifier_is_measured_in_both_label_modes(family, labels):
    training = TrainingTerms(
        task="classification", classes=("no", "yes"), max_length=32, labels=labels
    )
    found = measured(work(tiny_model(family), training=training))
    points = [(p.blocks, p.sequences * p.length, p.in_flight) for p in found.blocks]
    assert points == [(1, 16, 1), (1, 64, 1), (3, 16, 1), (3, 64, 1), (3, 64, 2)]
    assert [p.tokens for p in found.head] == ([64, 16] if labels == "server" else [])


def copying_work() -> ServerWork:
    """Return work with a head of 16 MiB that is copied to the dtype it is computed in."""
    model = tiny_model("llama", vocab_size=2**18)
    return work(model, training=TrainingTerms(max_length=32, labels="server", dtype="bfloat16"))


def test_a_heads_weights_are_in_every_points_memory():
    found = measured(copying_work())
    assert min(p.peak_bytes for p in found.blocks) - found.runtime_bytes >= 0.9 * HEAD_BYTES


def test_a_model_of_one_block_is_measured_too():
    found = measured(work(tiny_model("gpt2", n_layer=1), "server"))
    assert {p.blocks for p in found.blocks} == {1}
    assert len(found.blocks) >= 3


def test_what_may_be_used_is_passed_on():
    found = measure_server(
        work(tiny_model("gpt2")), SystemClock(), memory_bytes=2**33, budget_s=0.1
    )
    assert found.memory_bytes == 2**33


def test_nothing_of_it_stays():
    own = copying_work()
    measured(own)  # what torch loads for its first work stays
    trim()
    before = resident_bytes()
    measured(own)
    trim()
    assert resident_bytes() - before < HEAD_BYTES / 2


def test_weights_of_another_model_are_an_error():
    tensors = tiny_model("gpt2", n_embd=64).tensors
    with pytest.raises(ModelError, match="not of the same model"):
        measured(work(tiny_model("gpt2"), tensors=tensors))


def test_a_target_that_does_not_exist_is_an_error():
    with pytest.raises(PlanError, match="q_proj"):
        measured(work(tiny_model("gpt2"), lora=LoraTerms(target_modules=("q_proj",))))
