"""The chunked loss of a frozen head equals torch's own."""

from __future__ import annotations

import pytest
import torch

from shared.modeling import loss as loss_module
from shared.modeling.loss import summed_cross_entropy


def both(hidden_MD, weight_VD, targets_M):
    """(loss, gradient) of ours and of torch's cross_entropy in float64."""
    ours = hidden_MD.clone().requires_grad_()
    summed_cross_entropy(ours, weight_VD, targets_M).mul(2.0).backward()
    loss = summed_cross_entropy(hidden_MD, weight_VD, targets_M)
    exact = hidden_MD.double().requires_grad_()
    logits_MV = exact @ weight_VD.double().t()
    expected = torch.nn.functional.cross_entropy(logits_MV, targets_M, reduction="sum")
    (2.0 * expected).backward()
    return (float(loss), ours.grad), (float(expected.detach()), exact.grad)


@pytest.mark.parametrize("positions", [1, 16, 17, 50])
def test_loss_and_gradient_are_exact_whatever_the_chunks(positions, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 1)  # chunks of 16, the smallest
    hidden_MD, weight_VD = torch.randn(positions, 8), torch.randn(33, 8)
    targets_M = torch.randint(0, 33, (positions,))
    (loss, gradient_MD), (expected, exact_MD) = both(hidden_MD, weight_VD, targets_M)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient_MD.double(), exact_MD, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    hidden_MD, weight_VD = torch.full((2, 4), 100.0), torch.randn(9, 4) * 10
    (loss, gradient_MD), (expected, exact_MD) = both(hidden_MD, weight_VD, torch.tensor([1, 2]))
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient_MD.double(), exact_MD, rtol=1e-4, atol=1e-4)


def test_no_targets_is_a_loss_of_zero():
    hidden_MD = torch.zeros(0, 8, requires_grad=True)
    loss = summed_cross_entropy(hidden_MD, torch.randn(5, 8), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden_MD.grad.shape == (0, 8)


def test_never_more_logits_at_once_than_a_chunk(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 40 * 20)
    seen = []
    softmax = loss_module._softmax

    def recording(hidden_CD, weight_VD, targets_C):
        seen.append(len(hidden_CD) * len(weight_VD))
        return softmax(hidden_CD, weight_VD, targets_C)

    monkeypatch.setattr(loss_module, "_softmax", recording)
    summed_cross_entropy(torch.randn(95, 8), torch.randn(40, 8), torch.zeros(95).long())
    assert max(seen) == 40 * 20
    assert sum(seen) == 95 * 40
