"""Attention within documents: packed samples lie in one row and never see each other.

Legend: T packed tokens, H heads, G key/value heads, D head size, L length of one document.

On the CPU each document runs through `scaled_dot_product_attention` alone, which wastes nothing and makes
isolation a matter of slicing. ALiBi distances are counted within the document. The same function serves BLOOM
and, through transformers' attention interface, every other family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

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

        def tensor(array: Any) -> Tensor:
            host = torch.from_numpy(array)
            return (
                host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
            )

        return cls(
            tensor(batch.input_ids),
            tensor(batch.position_ids),
            batch.borders,
            tensor(batch.target_positions),
            tensor(batch.target_ids),
        )


def packed_attention(
    query: Tensor,  # T H D
    key: Tensor,  # T G D
    value: Tensor,  # T G D
    borders: Sequence[int],
    slopes: Tensor | None = None,  # H
    scale: float | None = None,
) -> Tensor:
    """Causal attention within each document; with `slopes`, ALiBi biases by distance within the document.

    Returns T H D. `borders` are the N + 1 document borders, from 0 to T.
    """
    bias = None
    if slopes is not None:
        longest = max(stop - start for start, stop in pairwise(borders))
        bias = alibi_bias(slopes, longest).to(query.dtype)  # H L L
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, stop in pairwise(borders):
        length = stop - start
        attended = F.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1)[None],  # 1 H L D
            key[start:stop].transpose(0, 1)[None],
            value[start:stop].transpose(0, 1)[None],
            attn_mask=None if bias is None else bias[None, :, :length, :length],
            is_causal=bias is None,
            scale=scale,
            enable_gqa=grouped,
        )
        outputs.append(attended[0].transpose(0, 1))  # L H D
    return torch.cat(outputs)


def alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """Additive causal bias [H, L, L]: slope · (key − query), and −∞ ahead of the query (Press et al. 2022)."""
    positions = torch.arange(length, device=slopes.device)
    distance = positions[None, :] - positions[:, None]  # L L, ≤ 0 where allowed
    ahead = torch.where(distance > 0, -torch.inf, 0.0)
    return slopes.float()[:, None, None] * distance + ahead


def register_with_transformers() -> str:
    """Make packed attention an attention implementation of transformers; returns its name.

    The model is called with one row of T tokens and `borders=…`, which transformers hands to every layer.
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
    borders: Sequence[int] = (),
    **_unused: Any,
) -> tuple[Tensor, None]:
    longest = max(stop - start for start, stop in pairwise(borders))
    if sliding_window is not None and longest > sliding_window:
        raise ModelError(
            f"A sample has {longest} tokens and this model attends over a window of {sliding_window}; "
            f"set data.max_seq_length to {sliding_window} or less."
        )
    if dropout and module.training:
        raise ModelError(
            "Attention dropout is not supported; set attention_dropout to 0 in the model's config.json."
        )
    out = packed_attention(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), borders, scale=scaling
    )
    return out[None], None  # 1 T H D
