"""The chunked loss equals plain cross-entropy in value and gradient, for any chunk size."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from firefly.model import loss
from firefly.model.loss import linear_cross_entropy


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(2, 200), st.integers(1, 4000), st.integers(0, 9))
def test_equals_cross_entropy(rows: int, vocab: int, chunk_bytes: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 8, requires_grad=True)
    head = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected * 0.3, (hidden, head))
    usual = loss.CHUNK_BYTES["cpu"]
    loss.CHUNK_BYTES["cpu"] = chunk_bytes
    try:
        total, each = linear_cross_entropy(hidden, head, targets)
        gradients = torch.autograd.grad(total * 0.3, (hidden, head))
        with torch.no_grad():
            without_gradient, each_again = linear_cross_entropy(hidden, head, targets)
    finally:
        loss.CHUNK_BYTES["cpu"] = usual
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(each.sum(), expected.detach(), atol=1e-4, rtol=1e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(without_gradient, total.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(each_again, each, atol=1e-5, rtol=1e-5)


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((3, 4), 300.0, requires_grad=True)
    head = torch.eye(4).repeat(2, 1) * 300
    total, _ = linear_cross_entropy(hidden, head, torch.tensor([0, 1, 2]))
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


def test_bf16_is_no_worse_than_the_naive_bf16_path() -> None:
    """A kernel is judged against the naive path's own error to float32."""
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 32), torch.randn(300, 32)
    targets = torch.randint(300, (64,))
    exact = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    naive = F.cross_entropy((hidden.bfloat16() @ head.bfloat16().T).float(), targets, reduction="sum")
    ours, _ = linear_cross_entropy(hidden.bfloat16(), head, targets)
    assert abs(float(ours - exact)) <= 1.5 * abs(float(naive - exact)) + 1e-3


def test_no_learned_token_is_zero() -> None:
    total, each = linear_cross_entropy(
        torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4), torch.zeros(0, dtype=torch.long)
    )
    assert float(total.detach()) == 0.0 and each.shape == (0,)
