"""LoRA on frozen linear modules: the formula, the frozen residual, folding, seeded dropout."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.adapters import LoraPair, ModuleAdapter
from shared.errors import NumericsError, ProtocolError
from shared.modeling.lora import Dropout, LoraLinear, PartAdapters

INPUTS, OUTPUTS = 12, 20
BASES = ["linear", "linear without bias", "conv1d"]


def base_of(kind, dtype=torch.float32):
    base = {
        "linear": lambda: nn.Linear(INPUTS, OUTPUTS),
        "linear without bias": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
        "conv1d": lambda: Conv1D(OUTPUTS, INPUTS),
    }[kind]()
    return base.to(dtype).requires_grad_(False)


def random_pair(rank, *, scaling=2.0, seed=0):
    random = np.random.default_rng([seed, rank])
    a_RI = random.standard_normal((rank, INPUTS)).astype(np.float32)
    b_OR = random.standard_normal((OUTPUTS, rank)).astype(np.float32)
    return LoraPair(a_RI, b_OR, scaling)


def frozen_pair(rank):
    return random_pair(rank, scaling=1.0, seed=1)


def wrapped(base):
    root = nn.Module()
    root.inner = nn.Module()
    root.inner.q_proj = base
    return root, PartAdapters(root, dropout=0.0)


def held(trainable, frozen=None):
    return {"inner.q_proj": ModuleAdapter(trainable, frozen)}


def expected_output(base, x, *pairs):
    delta_OI = sum(torch.from_numpy(pair.delta_OI()) for pair in pairs)
    return base(x).double() + x.double() @ delta_OI.t()


@pytest.mark.parametrize("residual_rank", [None, 1, 3, 8, 12])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("kind", BASES)
def test_output_is_base_plus_residual_plus_adapter(kind, rank, residual_rank):
    base, x = base_of(kind), torch.randn(2, 3, INPUTS)
    frozen = None if residual_rank is None else frozen_pair(residual_rank)
    module = LoraLinear(base, ModuleAdapter(random_pair(rank), frozen), dropout=Dropout(0.0))
    pairs = [random_pair(rank)] + ([frozen] if frozen else [])
    torch.testing.assert_close(
        module(x).double(), expected_output(base, x, *pairs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("residual_rank", [3, 12])
def test_a_residual_leaves_the_base_bit_identical(kind, residual_rank):
    base = base_of(kind)
    before = base.weight.clone()
    _, adapters = wrapped(base)
    adapters.replace(held(random_pair(2), frozen_pair(residual_rank)), fold=False)
    assert torch.equal(base.weight, before)


def test_a_second_residual_replaces_the_first():
    base, x = base_of("linear"), torch.randn(4, INPUTS)
    root, adapters = wrapped(base)
    adapters.replace(held(random_pair(2), frozen_pair(12)), fold=False)
    adapters.replace(held(random_pair(3), frozen_pair(2)), fold=False)
    expected = expected_output(base, x, random_pair(3), frozen_pair(2))
    torch.testing.assert_close(root.inner.q_proj(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_folding_adds_to_the_base_again_and_again(kind):
    base, x = base_of(kind), torch.randn(4, INPUTS)
    original = base.weight
    untouched = base_of(kind)
    untouched.load_state_dict(base.state_dict())
    root, adapters = wrapped(base)
    adapters.replace(held(random_pair(2), frozen_pair(3)), fold=True)
    adapters.replace(held(random_pair(0), frozen_pair(4)), fold=True)
    assert root.inner.q_proj is base
    expected = expected_output(untouched, x, frozen_pair(3), frozen_pair(4))
    torch.testing.assert_close(base(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(original, untouched.weight), "the tensor others may share was written to"


def test_rank_zero_without_a_residual_is_the_plain_module():
    root, adapters = wrapped(base := base_of("linear"))
    adapters.replace(held(random_pair(2)), fold=False)
    assert isinstance(root.inner.q_proj, LoraLinear)
    adapters.replace(held(random_pair(0)), fold=False)
    assert root.inner.q_proj is base
    assert adapters.read() == {}
    assert adapters.parameters() == {}


def test_what_is_set_is_read_back_and_is_a_copy():
    _, adapters = wrapped(base_of("linear"))
    pair = random_pair(4, scaling=0.5)
    adapters.replace(held(pair, frozen_pair(2)), fold=False)
    read = adapters.read()["inner.q_proj"]
    np.testing.assert_array_equal(read.a_RI, pair.a_RI)
    np.testing.assert_array_equal(read.b_OR, pair.b_OR)
    assert read.scaling == 0.5
    read.a_RI[:] = 0
    pair.b_OR[:] = 0
    assert np.count_nonzero(adapters.read()["inner.q_proj"].a_RI)
    assert np.count_nonzero(adapters.read()["inner.q_proj"].b_OR)


def test_adapters_are_float32_on_a_bfloat16_base_and_agree_with_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        theirs = get_peft_model(
            nn.Sequential(base_of("linear", torch.bfloat16)),
            LoraConfig(r=4, lora_alpha=8.0, target_modules=["0"]),
        )
    pair, x = random_pair(4), torch.randn(6, INPUTS, dtype=torch.bfloat16)
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(torch.from_numpy(pair.a_RI))
    layer.lora_B["default"].weight.data.copy_(torch.from_numpy(pair.b_OR))
    ours = LoraLinear(layer.base_layer, ModuleAdapter(pair), dropout=Dropout(0.0))
    assert {p.dtype for p in (ours.a_RI, ours.b_OR)} == {torch.float32}
    output = ours(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, theirs(x))


@pytest.mark.parametrize("rank", [2, 12])
def test_a_residual_survives_on_a_bfloat16_base(rank):
    """Below float32 it is never added to the weight, where rounding would take it away."""
    base, x = base_of("linear", torch.bfloat16), torch.randn(4, INPUTS, dtype=torch.bfloat16)
    small = LoraPair(frozen_pair(rank).a_RI, frozen_pair(rank).b_OR, 1e-4)
    module = LoraLinear(base, ModuleAdapter(random_pair(0), small), dropout=Dropout(0.0))
    with torch.no_grad():
        module.base.weight.zero_()
        module.base.bias.zero_()
    expected = x.double() @ torch.from_numpy(small.delta_OI()).t()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-2, atol=1e-6)


def test_only_the_adapter_takes_a_gradient():
    root, adapters = wrapped(base_of("conv1d"))
    adapters.replace(held(random_pair(2), frozen_pair(3)), fold=False)
    root.inner.q_proj(torch.randn(4, INPUTS)).sum().backward()
    trained = {name for name, p in root.named_parameters() if p.grad is not None}
    assert trained == {"inner.q_proj.a_RI", "inner.q_proj.b_OR"}


@pytest.mark.parametrize("name", ["inner.k_proj", "inner", "", "outer.q_proj"])
def test_an_adapter_for_what_is_not_held_changes_nothing(name):
    root, adapters = wrapped(base := base_of("linear"))
    with pytest.raises(ProtocolError, match="no linear module held here"):
        adapters.replace({**held(random_pair(2)), name: ModuleAdapter(random_pair(2))}, fold=False)
    assert root.inner.q_proj is base


def misfit():
    return LoraPair(np.zeros((2, INPUTS + 1)), np.zeros((OUTPUTS, 2)), 1.0)


def broken():
    return LoraPair(np.full((2, INPUTS), np.nan), np.zeros((OUTPUTS, 2)), 1.0)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (ModuleAdapter(misfit()), "do not fit"),
        (ModuleAdapter(random_pair(2), misfit()), "do not fit"),
        (ModuleAdapter(broken()), "NaN"),
        (ModuleAdapter(random_pair(2), broken()), "NaN"),
    ],
)
def test_a_bad_factor_is_refused_before_anything_changes(adapter, says):
    root, adapters = wrapped(base := base_of("linear"))
    before = base.weight.clone()
    with pytest.raises(NumericsError, match=rf"inner\.q_proj.*{says}"):
        adapters.replace({"inner.q_proj": adapter}, fold=True)
    assert root.inner.q_proj is base
    assert torch.equal(base.weight, before)


def dropped(seed, probability=0.3):
    dropout = Dropout(probability)
    dropout.begin(seed)
    return dropout(torch.ones(200, 50))


def test_the_same_seed_drops_the_same_entries():
    assert torch.equal(dropped(5), dropped(5))
    assert not torch.equal(dropped(5), dropped(6))
    assert not torch.equal(dropped(5)[:100], dropped(5)[100:])


def test_dropout_keeps_the_mean_and_the_share():
    entries = dropped(1)
    assert float((entries == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(entries.mean()) == pytest.approx(1.0, abs=0.03)
    assert entries.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]


def test_without_a_seed_nothing_is_dropped():
    assert torch.equal(dropped(None), torch.ones(200, 50))
