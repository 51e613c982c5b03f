"""Packed tokens and padded sequences."""

from __future__ import annotations

import pytest
import torch

from shared.modeling.packing import Packing

CPU = torch.device("cpu")


def test_positions_count_from_zero_in_each_sequence():
    packing = Packing.of((2, 3, 1), device=CPU)
    assert packing.positions_N.tolist() == [0, 1, 0, 1, 2, 0]


def test_tokens_go_left_and_padding_is_zero():
    packed_ND = torch.arange(1.0, 7.0).unsqueeze(1)
    padded_BTD = Packing.of((2, 3, 1), device=CPU).pad(packed_ND)
    assert padded_BTD.squeeze(2).tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]


@pytest.mark.parametrize("lengths", [(2, 3, 1), (4, 4), (5,)])
def test_unpadding_undoes_padding_and_passes_gradients(lengths):
    packing = Packing.of(lengths, device=CPU)
    packed_ND = torch.randn(sum(lengths), 3, requires_grad=True)
    back_ND = packing.unpad(packing.pad(packed_ND))
    assert torch.equal(back_ND, packed_ND)
    weights_ND = torch.randn_like(back_ND)
    (back_ND * weights_ND).sum().backward()
    assert torch.equal(packed_ND.grad, weights_ND)
