"""Attention within documents: packed samples lie in one row and never see each other.

Legend: T packed tokens, H heads, G key/value heads, D head size, L length of one document.

On the CPU each document runs through `scaled_dot_product_attention` alone, which wastes nothing and makes
isolation a matter of slicing. On CUDA one FlexAttention call serves all documents and skips the blocks between
them (tested here through its CPU forward pass; its CUDA kernels were compiled for an H200 and have not run yet). ALiBi
distances are counted within the document. The same attention serves BLOOM and, through transformers' interface, every
other family.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from firefly.errors import ModelError


class SupportsPacking(Protocol):
    """NumPy arrays of one packed batch, as `firefly.data.loader.Batch` has them."""

    @property
    def input_ids(self) -> Any: ...
    @property
    def position_ids(self) -> Any: ...
    @property
    def borders(self) -> list[int]: ...
    @property
    def target_positions(self) -> Any: ...
    @property
    def target_ids(self) -> Any: ...


@dataclass(frozen=True)
class PackedInput:
    """One packed batch on a device. `borders` stays on the host: document i is borders[i] : borders[i + 1]."""

    input_ids: Tensor  # T
    position_ids: Tensor  # T
    borders: list[int]  # N + 1
    target_positions: Tensor  # M
    target_ids: Tensor  # M

    @classmethod
    def of(cls, batch: SupportsPacking, device: torch.device) -> PackedInput:
        """Move a NumPy batch to `device`."""

        return cls(
            on_device(batch.input_ids, device),
            on_device(batch.position_ids, device),
            batch.borders,
            on_device(batch.target_positions, device),
            on_device(batch.target_ids, device),
        )


def on_device(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """What is in main memory as a tensor on `device`; the copy to a GPU goes on beside the host's work."""
    host = values if isinstance(values, Tensor) else torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class PackedAttention(Protocol):
    """Causal attention within each document of one batch; every layer of a model calls the same one."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attend: query T H D, key and value T G D; returns T H D. With a window, only to the nearest keys so many."""


BLOCK = 128
"""Tokens in a block of FlexAttention's mask."""
_NARROWEST = 16  # the smallest head that its CUDA kernels take

AttentionMaker = Callable[[Sequence[int], torch.device, Tensor | None], PackedAttention]
"""Makes the attention of one batch from its borders, device and ALiBi slopes (or None), as `packed_attention` does."""


def packed_attention(
    borders: Sequence[int], device: torch.device, slopes: Tensor | None = None
) -> PackedAttention:
    """The attention of a batch with these N + 1 document borders, from 0 to T; with `slopes` [H], ALiBi's.

    What all layers share (biases, block masks) is made here, once a batch.
    """
    # A single block would make FlexAttention compile its kernels once more, for so little.
    by_block = device.type == "cuda" and borders[-1] > BLOCK
    return ByBlock(borders, device, slopes) if by_block else ByDocument(borders, slopes)


class ByDocument:
    """Each document alone through `scaled_dot_product_attention`: the way of the CPU."""

    def __init__(self, borders: Sequence[int], slopes: Tensor | None = None) -> None:
        self.lengths = [stop - start for start, stop in pairwise(borders)]
        self.longest = max(self.lengths)
        self.bias = None if slopes is None else alibi_bias(slopes, self.longest)  # H L L
        self.bands: dict[int, Tensor] = {}  # by window: which keys each query sees, 1 L L

    @torch.compiler.disable  # type: ignore[untyped-decorator] # its shapes differ from document to document
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attend: query T H D, key and value T G D; returns T H D."""
        bias = None if self.bias is None else self.bias.to(query.dtype)
        if window is not None and window < self.longest:
            assert bias is None  # no family has both
            if window not in self.bands:
                self.bands[window] = _band(self.longest, window).to(query.device)
            bias = self.bands[window]
        # `split`, for its backward pass joins the gradients; that of each slice would fill a whole tensor.
        queries, keys, values = (
            torch.split(tensor.transpose(0, 1)[None], self.lengths, 2) for tensor in (query, key, value)
        )
        outputs = [
            F.scaled_dot_product_attention(
                one_query,  # 1 H L D
                one_key,  # 1 G L D
                one_value,  # 1 G L D
                attn_mask=None if bias is None else bias[None, :, :length, :length],
                is_causal=bias is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            for length, one_query, one_key, one_value in zip(self.lengths, queries, keys, values, strict=True)
        ]
        return torch.cat([output[0].transpose(0, 1) for output in outputs])


class ByBlock:
    """All documents at once through FlexAttention, which skips blocks of the score matrix: the way of CUDA.

    The block mask is worked out from the borders on the host, so nothing waits for the device.
    """

    def __init__(
        self, borders: Sequence[int], device: torch.device, slopes: Tensor | None = None, block: int = BLOCK
    ) -> None:
        lengths = np.diff(borders)
        self.longest = int(lengths.max())
        self.borders, self.slopes, self.block = np.asarray(borders), slopes, block
        self.document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # T
        self.document_of = on_device(self.document, device)
        self.masks: dict[int | None, BlockMask] = {}  # by window

        def alibi(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert slopes is not None
            return score + slopes[head] * (key - query)

        self.score_mod = None if slopes is None else alibi

    def mask(self, window: int | None) -> BlockMask:
        """The mask of the layers with this window, made once a batch."""
        if window is not None and window >= self.longest:
            window = None
        if window not in self.masks:
            document_of = self.document_of

            def may_see(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                seen = (query >= key) & (document_of[query] == document_of[key])
                return seen if window is None else seen & (query - key < window)

            partial, partial_indices, full, full_indices = (
                on_device(array, document_of.device)
                for array in causal_blocks(self.document, self.borders, self.block, window)
            )
            self.masks[window] = BlockMask.from_kv_blocks(
                partial,
                partial_indices,
                full,
                full_indices,
                BLOCK_SIZE=self.block,
                mask_mod=may_see,
                seq_lengths=(len(self.document), len(self.document)),
            )
        return self.masks[window]

    @torch.compiler.disable  # type: ignore[untyped-decorator] # FlexAttention is compiled on its own, whether the layers are or not
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attend: query T H D, key and value T G D; returns T H D."""
        if query.shape[-1] < _NARROWEST:
            by_document = ByDocument(self.borders.tolist(), self.slopes)
            return by_document(query, key, value, scale, window)  # type: ignore[no-any-return]
        attend = _compiled_flex_attention() if query.is_cuda else flex_attention
        out = attend(
            *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),  # 1 H T D, twice 1 G T D
            score_mod=self.score_mod,
            block_mask=self.mask(window),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[0].transpose(0, 1)  # type: ignore[no-any-return]


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def causal_blocks(
    document: NDArray[np.int32], borders: NDArray[np.int64], block: int, window: int | None = None
) -> tuple[NDArray[np.int32], ...]:
    """Which key blocks each query block must look at: FlexAttention's (counts, indices) of partly and of fully
    visible blocks, [1, 1, R] and [1, 1, R, R] for R = ⌈T / block⌉.

    A query block sees from the first block of its first token's document up to itself. Blocks before the diagonal
    are seen fully where the whole span, from the key block's first token to the query block's last, is one document,
    no longer than a window.
    """
    first = np.arange(0, len(document), block)  # R
    last = np.minimum(first + block, len(document)) - 1
    earliest = borders[document[first]] // block
    row, column = np.arange(len(first))[:, None], np.arange(len(first))[None, :]
    seen = (column >= earliest[:, None]) & (column <= row)
    full = seen & (column < row) & (document[first][None, :] == document[last][:, None])
    if window is not None:
        seen &= first[:, None] - last[None, :] < window
        full &= last[:, None] - first[None, :] < window

    def ordered(chosen: NDArray[np.bool_]) -> list[NDArray[np.int32]]:
        counts = chosen.sum(1, dtype=np.int32)
        indices = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
        return [counts[None, None], indices[None, None]]

    return (*ordered(seen & ~full), *ordered(full))


def alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """Additive causal bias [H, L, L]: slope · (key − query), and −∞ ahead of the query (Press et al. 2022)."""
    positions = torch.arange(length, device=slopes.device)
    distance = positions[None, :] - positions[:, None]  # L L, ≤ 0 where allowed
    ahead = torch.where(distance > 0, -torch.inf, 0.0)
    return slopes.float()[:, None, None] * distance + ahead


def _band(length: int, window: int) -> Tensor:
    """What each query sees, itself and the window − 1 tokens before: bool, 1 L L."""
    return torch.ones(1, length, length, dtype=torch.bool).tril().triu(1 - window)


def register_with_transformers() -> str:
    """Make packed attention an attention implementation of transformers; returns its name.

    The model is called with one row of T tokens and `packed=…`, which transformers hands to every layer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = "firefly_packed"
    AttentionInterface.register(name, _transformers_attention)
    AttentionMaskInterface.register(name, lambda *_args, **_kwargs: None)
    return name


def _transformers_attention(
    module: Any,
    query: Tensor,  # 1 H T D
    key: Tensor,  # 1 G T D
    value: Tensor,  # 1 G T D
    attention_mask: Tensor | None,  # noqa: ARG001 - the borders say everything
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed: PackedAttention | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    assert packed is not None
    if dropout and module.training:
        raise ModelError(
            "Attention dropout is not supported; set attention_dropout to 0 in the model's config.json."
        )
    query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))  # T H D, twice T G D
    out = packed(query, key, value, scaling, sliding_window)
    return out[None], None  # 1 T H D
