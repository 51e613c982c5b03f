"""Cutting a model: what each part holds, and that it computes what the whole does."""

from __future__ import annotations

import pytest
import torch

from shared.errors import ModelError, PlanError
from shared.modeling.packing import Packing
from shared.modeling.splitting import Placement, build_back, build_front
from tests.support.tiny_models import FAMILIES, tiny_batch, tiny_model

CPU = torch.device("cpu")
FLOAT32 = Placement(dtype=torch.float32, device=CPU)
LENGTHS = (9, 4, 12)


def packed_tokens(batch):
    return torch.from_numpy(batch.input_ids).long()


def whole_logits(model, batch):
    """Logits (N, V) of the plain model, each sequence run alone: no padding at all."""
    plain = model.hugging_face()
    sequences = packed_tokens(batch).split(batch.lengths)
    with torch.no_grad():
        return torch.cat([plain(input_ids=ids.unsqueeze(0)).logits[0] for ids in sequences])


@torch.no_grad()
def split_hidden(model, batch, split_layer):
    packing = Packing.of(batch.lengths, device=CPU)
    front = build_front(
        model.config, model.tensors, split_layer=split_layer, head=True, placement=FLOAT32
    )
    hidden_ND = front(packed_tokens(batch), packing)
    if split_layer < 3:
        back = build_back(model.config, model.tensors, first_block=1, head=False, placement=FLOAT32)
        hidden_ND = back(hidden_ND, packing, split_layer=split_layer)
    return front, hidden_ND


@pytest.mark.parametrize("split_layer", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_cutting_change_no_loss(family, split_layer):
    model, batch = tiny_model(family), tiny_batch(LENGTHS)
    labels_N = torch.from_numpy(batch.labels).long()
    front, hidden_ND = split_hidden(model, batch, split_layer)
    expected = torch.nn.functional.cross_entropy(
        whole_logits(model, batch), labels_N, reduction="sum"
    )
    loss = front.loss_sum(hidden_ND, labels_N)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_windows_act_where_the_config_says(family):
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    batch = tiny_batch((12, 5))
    labels_N = torch.from_numpy(batch.labels).long()
    losses = []
    for model in (tiny_model(family, **window), tiny_model(family)):
        front, hidden_ND = split_hidden(model, batch, 2)
        losses.append(float(front.loss_sum(hidden_ND, labels_N)))
        logits_NV = whole_logits(model, batch)
        expected = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
        assert losses[-1] == pytest.approx(float(expected), rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    ],
)
def test_rotary_tables_are_the_models_own(rope):
    model, batch = tiny_model("llama", rope_parameters=rope), tiny_batch(LENGTHS)
    labels_N = torch.from_numpy(batch.labels).long()
    front, hidden_ND = split_hidden(model, batch, 1)
    logits_NV = whole_logits(model, batch)
    expected = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    assert float(front.loss_sum(hidden_ND, labels_N)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fronts_memory_is_exactly_its_pieces(family, head):
    model = tiny_model(family)
    names = model.architecture.front_pieces(2, head_on_device=head)
    expected = {n: t for n, t in model.tensors.items() if model.architecture.piece_of(n) in names}
    front = build_front(model.config, model.tensors, split_layer=2, head=head, placement=FLOAT32)
    held = dict(front.skeleton.named_parameters())
    assert held.keys() == expected.keys()
    assert sum(p.nbytes for p in held.values()) == sum(t.nbytes for t in expected.values())
    assert not any(p.is_meta or p.requires_grad for p in held.values())
    assert not any(buffer.is_meta for buffer in front.skeleton.buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_back_without_a_head_holds_only_its_blocks(family):
    model = tiny_model(family)
    back = build_back(model.config, model.tensors, first_block=1, head=False, placement=FLOAT32)
    pieces = {model.architecture.piece_of(name) for name, _ in back.skeleton.named_parameters()}
    assert pieces == {"block.1", "block.2"}


def test_a_front_reads_nothing_but_its_own_files(tmp_path):
    model = tiny_model("llama")
    base = model.front_base(tmp_path, split_layer=1, head=False)
    (tmp_path / "block.1.safetensors").unlink()
    front = build_front(
        model.config, base.files.values(), split_layer=1, head=False, placement=FLOAT32
    )
    weight = front.skeleton.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(weight, model.tensors["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_is_held_in_the_dtype_that_was_asked_for(dtype):
    model, batch = tiny_model("llama"), tiny_batch(LENGTHS)
    placement = Placement(dtype=dtype, device=CPU)
    front = build_front(model.config, model.tensors, split_layer=3, head=True, placement=placement)
    hidden_ND = front(packed_tokens(batch), Packing.of(LENGTHS, device=CPU))
    assert hidden_ND.dtype == dtype
    labels_N = torch.from_numpy(batch.labels).long()
    expected = torch.nn.functional.cross_entropy(
        whole_logits(model, batch), labels_N, reduction="sum"
    )
    assert float(front.loss_sum(hidden_ND, labels_N)) == pytest.approx(float(expected), rel=0.02)


def test_a_missing_weight_is_named():
    model = tiny_model("gpt2")
    tensors = {n: t for n, t in model.tensors.items() if n != "transformer.h.0.ln_1.bias"}
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.ln_1\.bias is missing"):
        build_front(model.config, tensors, split_layer=1, head=False, placement=FLOAT32)


def test_a_weight_of_another_model_is_refused():
    model = tiny_model("gpt2")
    config = {**model.config, "n_inner": 64}
    with pytest.raises(ModelError, match=r"c_fc.*\[32, 128\].*\[32, 64\]"):
        build_front(config, model.tensors, split_layer=1, head=False, placement=FLOAT32)


def test_a_damaged_file_is_refused(tmp_path):
    model = tiny_model("gpt2")
    base = model.front_base(tmp_path, split_layer=1, head=False)
    base.files["block.0"].write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=r"block\.0\.safetensors cannot be read"):
        build_front(model.config, base.files.values(), split_layer=1, head=False, placement=FLOAT32)


def test_a_server_with_nothing_to_do_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(PlanError, match="3 blocks"):
        build_back(model.config, model.tensors, first_block=3, head=False, placement=FLOAT32)
