"""Attention over all documents at once equals attention document by document, and its block mask is exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex

from firefly.model import packed
from firefly.model.bloom import alibi_slopes
from firefly.model.packed import ByBlock, ByDocument, causal_blocks, packed_attention

CPU = torch.device("cpu")


def inputs(num_tokens: int, heads: int, groups: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(num_tokens, count, 16) for count in (heads, groups, groups)]


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(("alibi", "window"), [(False, None), (True, None), (False, 20), (False, 500)])
def test_by_block_equals_by_document(groups: int, alibi: bool, window: int | None) -> None:
    borders = [0, 5, 6, 70, 71, 130]
    slopes = alibi_slopes(6) if alibi else None
    tensors = inputs(130, 6, groups)
    expected = ByDocument(borders, slopes)(*tensors, 0.3, window)
    got = ByBlock(borders, CPU, slopes, block=16)(*tensors, 0.3, window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_by_block_sees_no_neighbour() -> None:
    tensors = inputs(60, 4, 4)
    attention = ByBlock([0, 21, 60], CPU, alibi_slopes(4), block=16)
    before = attention(*tensors)
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[:21] = 7.0
    assert torch.equal(attention(*changed)[21:], before[21:])


@pytest.mark.parametrize(("alibi", "window"), [(True, None), (False, 20)])
def test_gradients_by_block_equal_those_by_document(
    monkeypatch: pytest.MonkeyPatch, alibi: bool, window: int | None
) -> None:
    """PyTorch has the mathematics of the backward pass on a CPU and forbids it for want of a kernel."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(packed, "flex_attention", torch.compile(flex.flex_attention, backend="eager"))
    borders = [0, 5, 6, 70, 71, 130]
    slopes = alibi_slopes(4) if alibi else None
    tensors = inputs(130, 4, 4 if alibi else 2)
    gradients = []
    for attention in (ByDocument(borders, slopes), ByBlock(borders, CPU, slopes, block=16)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        attention(*leaves, 0.3, window).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_kernels_are_made_once_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond eight times PyTorch would give up compiling, and hold all scores in memory."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(packed, "flex_attention", compiled)
    for borders in ([0, 5, 70, 130], [0, 40, 90], [0, 200, 201, 260, 270], [0, 33]):
        attention = ByBlock(borders, CPU, alibi_slopes(4), block=16)
        attention(*inputs(borders[-1], 4, 4))
    assert counter.frame_count == 1


def test_one_block_and_narrow_heads_go_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(packed_attention([0, 40, 128], torch.device("cuda")), ByDocument)
    monkeypatch.setattr(packed, "flex_attention", None)
    tensors = [one[..., :12] for one in inputs(130, 4, 4)]
    slopes = alibi_slopes(4)
    assert torch.equal(
        ByBlock([0, 30, 130], CPU, slopes)(*tensors), ByDocument([0, 30, 130], slopes)(*tensors)
    )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.sampled_from([4, 16]),
    st.none() | st.integers(1, 45),
)
def test_blocks_are_those_of_the_full_mask(lengths: list[int], block: int, window: int | None) -> None:
    borders = np.concatenate([[0], np.cumsum(lengths)])
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    place = np.arange(len(document))
    mask = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        mask &= place[:, None] - place < window
    edges = [*range(0, len(document), block), len(document)]
    some, every = (
        {
            (row, column)
            for row, (top, bottom) in enumerate(pairwise(edges))
            for column, (left, right) in enumerate(pairwise(edges))
            if reduce(mask[top:bottom, left:right])
        }
        for reduce in (np.any, np.all)
    )
    parts, partial_indices, fulls, full_indices = (
        a[0, 0] for a in causal_blocks(document, borders, block, window)
    )

    def listed(counts: np.ndarray, indices: np.ndarray) -> set[tuple[int, int]]:
        return {(row, int(column)) for row, n in enumerate(counts) for column in indices[row][:n]}

    partial, full = listed(parts, partial_indices), listed(fulls, full_indices)
    # A diagonal block of one token is seen fully, and it does no harm to look at its mask.
    # Neither does a block that only its corner beyond another document would have put inside the window.
    assert partial | full >= some and not partial & full
    assert window is not None or partial | full == some
    assert full == {(row, column) for row, column in every if row != column}
    if window is not None:  # and of blocks outside the window none is looked at
        edge = place[::block]
        reach = edge[:, None] - np.minimum(edge + block, len(place)) + 1
        assert all(reach[row, column] < window for row, column in partial | full)
