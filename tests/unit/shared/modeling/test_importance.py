"""Importance from inputs and output gradients, against gradients of the weights themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_agent.backends.base import TokenBatch
from shared.adapters import HeldAdapters, LoraPair, ModuleAdapter
from shared.errors import NumericsError, ProtocolError
from shared.modeling import importance
from shared.modeling.importance import watching
from shared.modeling.packing import Packing
from shared.modeling.splitting import FrontModel, Placement, build_front
from shared.terms import LoraTerms
from tests.support.dense_importance import dense_importance
from tests.support.tiny_models import TinyModel, fresh_adapters, tiny_batch, tiny_model

CPU = torch.device("cpu")
LENGTHS = (9, 4, 12)
SCALES = {"gpt2": "c_attn", "llama": "q_proj", "qwen2": "down_proj", "qwen3": "o_proj"}
"""By family the target that is adapted in these tests; all others are bare."""


def every_module(model: TinyModel) -> list[str]:
    paths = map(model.architecture.block_path, range(model.architecture.block_count))
    return [f"{path}.{inside}" for path in paths for inside in model.architecture.linears]


def some_adapters(model: TinyModel) -> HeldAdapters:
    """Adapt one kind of module: in block 1 with a residual, in block 2 at rank 0 with one."""
    lora = LoraTerms(r=4, target_modules=(SCALES[model.config["model_type"]],))
    held = dict(fresh_adapters(model.architecture, lora, blocks=range(3)))
    for block, (name, adapter) in enumerate(held.items()):
        pair = adapter.trainable
        outputs, inputs = pair.b_OR.shape[0], pair.a_RI.shape[1]
        random = np.random.default_rng(block)
        rank = 3 if block == 1 else 40  # factored, and as a second weight
        frozen = LoraPair(
            0.1 * random.standard_normal((rank, inputs)),
            0.1 * random.standard_normal((outputs, rank)),
            1.0,
        )
        empty = LoraPair(np.zeros((0, inputs)), np.zeros((outputs, 0)), 1.0)
        if block:
            held[name] = ModuleAdapter(pair if block == 1 else empty, frozen)
    return held


def front_of(model: TinyModel, adapters: HeldAdapters, **placement) -> FrontModel:
    front = build_front(
        model.config,
        model.tensors,
        split_layer=3,
        head=True,
        placement=Placement(**{"dtype": torch.float32, "device": CPU, **placement}),
    )
    front.adapters.replace(adapters, fold=False)
    return front


class Probed:
    """One micro-batch that went through a whole model under watch, its loss not yet back."""

    def __init__(self, front: FrontModel, batch: TokenBatch, modules) -> None:
        packing = Packing.of(batch.lengths, device=CPU)
        embedded = front.embed(torch.from_numpy(batch.input_ids).long(), packing)
        with watching(front.skeleton, modules, source=embedded) as self.watched:
            hidden = front.run_blocks(embedded, packing, first=0)
        self.loss = front.loss_sum(hidden, torch.from_numpy(batch.labels).long())

    def back(self) -> dict[str, float]:
        return dict(self.watched.backward(self.loss, None, what="micro-batch 0")[1])


@pytest.mark.parametrize("family", SCALES)
@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_what_dense_gradients_give(family, adapted):
    model = tiny_model(family)
    adapters = some_adapters(model) if adapted else {}
    batch = tiny_batch(LENGTHS)
    sums = Probed(front_of(model, adapters), batch, every_module(model)).back()
    assert sums == pytest.approx(dense_importance(model, adapters, [batch]), rel=1e-5)


def test_micro_batches_that_are_open_together_keep_their_own():
    model = tiny_model("gpt2")
    front, modules = front_of(model, some_adapters(model)), every_module(model)
    batches = [tiny_batch(LENGTHS, seed=seed) for seed in range(3)]
    opened = [Probed(front, batch, modules) for batch in batches]
    for place in (1, 2, 0):
        alone = Probed(front, batches[place], modules).back()
        assert opened[place].back() == alone


def test_only_what_was_asked_for_is_measured_and_nothing_is_learnt():
    model = tiny_model("llama")
    front = front_of(model, some_adapters(model))
    wanted = every_module(model)[3:5]
    probed = Probed(front, tiny_batch(LENGTHS), wanted)
    assert not any(module._forward_hooks for module in front.modules()), "no hook is left behind"
    assert set(probed.back()) == set(wanted)
    assert all(parameter.grad is None for parameter in front.parameters())


def test_a_few_rows_at_a_time_are_as_good_as_all(monkeypatch):
    model = tiny_model("qwen2")
    front, modules = front_of(model, some_adapters(model)), every_module(model)
    at_once = Probed(front, tiny_batch(LENGTHS), modules).back()
    monkeypatch.setattr(importance, "CHUNK_WEIGHTS", 7 * 32)
    assert Probed(front, tiny_batch(LENGTHS), modules).back() == pytest.approx(at_once, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_measured_in_float32(dtype):
    model = tiny_model("gpt2")
    adapters, modules = some_adapters(model), every_module(model)
    batch = tiny_batch(LENGTHS)
    exact = Probed(front_of(model, adapters), batch, modules).back()
    half = Probed(front_of(model, adapters, dtype=dtype), batch, modules).back()
    # What half precision did to the activations themselves is left: it averages out in a sum.
    assert half == pytest.approx(exact, rel=0.03)


def test_a_sequence_that_is_padded_counts_no_more_than_by_itself():
    model = tiny_model("gpt2")
    front, modules = front_of(model, {}), every_module(model)
    short, long = tiny_batch((4,)), tiny_batch((12,), seed=1)
    silent = np.full(12, -100, np.int32)
    together = TokenBatch(
        np.concatenate([short.input_ids, long.input_ids]),
        np.concatenate([short.labels, silent]),
        (4, 12),
    )
    padded = Probed(front, together, modules).back()
    assert padded == pytest.approx(Probed(front, short, modules).back(), rel=1e-5)


def test_what_is_no_linear_module_here_is_refused():
    model = tiny_model("gpt2")
    front = front_of(model, {})
    for name in ("transformer.h.0.ln_1", "transformer.h.9.attn.c_attn"):
        with pytest.raises(ProtocolError, match=f"{name} is no linear module held here"):
            Probed(front, tiny_batch(LENGTHS), [name])


def test_what_is_not_finite_is_refused():
    model = tiny_model("gpt2")
    probed = Probed(front_of(model, {}), tiny_batch(LENGTHS), every_module(model))
    probed.loss = probed.loss * float("inf")
    with pytest.raises(NumericsError, match="micro-batch 0: the importance of transformer"):
        probed.back()


def test_dropout_is_the_callers_to_switch_off():
    model = tiny_model("gpt2")
    front = front_of(model, some_adapters(model), lora_dropout=0.5)
    plain = Probed(front, tiny_batch(LENGTHS), every_module(model)).back()
    front.adapters.dropout.begin(1)
    assert Probed(front, tiny_batch(LENGTHS), every_module(model)).back() != plain
    front.adapters.dropout.begin(None)
    assert Probed(front, tiny_batch(LENGTHS), every_module(model)).back() == plain
