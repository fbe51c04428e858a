"""The chunked loss equals plain cross-entropy in value and gradient, for any chunk size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from firefly.model import loss
from firefly.model.loss import linear_cross_entropy


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 70),
    st.integers(2, 200),
    st.integers(1, 4000),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_equals_cross_entropy(
    rows: int, vocab: int, chunk_bytes: int, seed: int, dtype: torch.dtype, weighted: bool
) -> None:
    """Gradients in float64 to 1e-9 of the naive ones; 1e-6 is asked."""
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 8, requires_grad=True, dtype=dtype)
    head = torch.randn(vocab, 8, requires_grad=True, dtype=dtype)
    targets = torch.randint(vocab, (rows,))
    weights = torch.rand(rows, dtype=dtype) if weighted else None
    each_expected = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    expected = each_expected.sum() if weights is None else (each_expected * weights).sum()
    expected_gradients = torch.autograd.grad(expected * 0.3, (hidden, head))
    usual = loss.CHUNK_BYTES["cpu"]
    loss.CHUNK_BYTES["cpu"] = chunk_bytes
    try:
        total, each = linear_cross_entropy(hidden, head, targets, weights)
        gradients = torch.autograd.grad(total * 0.3, (hidden, head))
        with torch.no_grad():
            without_gradient, each_again = linear_cross_entropy(hidden, head, targets, weights)
    finally:
        loss.CHUNK_BYTES["cpu"] = usual
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(each, each_expected.detach(), atol=1e-4, rtol=1e-5)
    near = {"atol": 1e-9, "rtol": 0.0} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, **near)
    torch.testing.assert_close(without_gradient, total.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(each_again, each, atol=1e-5, rtol=1e-5)


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((3, 4), 300.0, requires_grad=True)
    head = torch.eye(4).repeat(2, 1) * 300
    total, _ = linear_cross_entropy(hidden, head, torch.tensor([0, 1, 2]))
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


def test_bf16_is_no_worse_than_the_naive_bf16_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is judged against the naive path's own error to float32, here in the mean over twelve draws."""
    ours, naive = torch.zeros(3), torch.zeros(3)  # errors of the loss and of both gradients
    for seed in range(12):
        torch.manual_seed(seed)
        hidden, head = torch.randn(96, 32, requires_grad=True), torch.randn(300, 32, requires_grad=True)
        targets = torch.randint(300, (96,))
        monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 300 * (96 if seed % 2 else 40))
        half = hidden.bfloat16()
        totals = (
            F.cross_entropy(hidden @ head.T, targets, reduction="sum"),
            linear_cross_entropy(half, head, targets)[0],
            F.cross_entropy((half @ head.bfloat16().T).float(), targets, reduction="sum"),
        )
        exact, *others = (
            [total.detach(), *torch.autograd.grad(total, (hidden, head), retain_graph=True)]
            for total in totals
        )
        for errors, got in zip((ours, naive), others, strict=True):
            errors += torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, exact, strict=True)])
    assert (ours <= naive * 1.0001).all(), ours / naive


def test_no_learned_token_is_zero() -> None:
    total, each = linear_cross_entropy(
        torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4), torch.zeros(0, dtype=torch.long)
    )
    assert float(total.detach()) == 0.0 and each.shape == (0,)
