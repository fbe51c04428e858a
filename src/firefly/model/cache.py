"""Keys and values of what was read before, so that each step of an answer reads one token alone.

    cache = KeyValueCache(num_rows)
    model.hidden(batch, cache.attention)      # every row's new tokens, packed end to end; the cache grows by them
    cache.drop(row)                           # an answer is done: the last row takes its place

Rows are of different lengths and hold no padding, so any row can end and a new prompt begin at any step.

Legend: R rows, T packed new tokens, S stored tokens, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from firefly.model.packed import ByDocument

_STEP = 64  # tokens of room that are added at a time


class KeyValueCache:
    """Stored keys and values of up to R rows; `lengths` has the tokens of each row in use."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.lengths: list[int] = []
        self._layers: list[
            Tensor
        ] = []  # each 2 R G S D: keys, values; zeros, as 0 · NaN is NaN where nothing is

    def attention(
        self, borders: Sequence[int], device: torch.device, slopes: Tensor | None = None
    ) -> CachedAttention:
        """The attention of one step: row i gets the new tokens borders[i] : borders[i + 1].

        Rows that are in use get one token each; rows behind them are new and get their whole prompts.
        """
        return CachedAttention(self, borders, device, slopes)

    def drop(self, row: int) -> None:
        """Forget a row and move the last one there."""
        length = self.lengths[-1]
        for stored in self._layers:
            stored[:, row, :, :length] = stored[:, len(self.lengths) - 1, :, :length]
        self.lengths[row] = length
        self.lengths.pop()

    def layer(self, number: int, key: Tensor) -> Tensor:
        """The store of one layer, 2 R G S D, with room for every row's length; `key`, T G D, shows its shape."""
        room = -(-max(self.lengths) // _STEP) * _STEP
        if number == len(self._layers):
            self._layers.append(key.new_zeros(2, self.num_rows, key.shape[1], room, key.shape[2]))
        stored = self._layers[number]
        if stored.shape[3] < room:
            grown = stored.new_zeros(*stored.shape[:3], room, stored.shape[4])
            grown[:, :, :, : stored.shape[3]] = stored
            self._layers[number] = stored = grown
        return stored


class CachedAttention:
    """Attention of new tokens over their own row's past; the layers of a model call it in order, once each."""

    def __init__(
        self, cache: KeyValueCache, borders: Sequence[int], device: torch.device, slopes: Tensor | None
    ) -> None:
        self.cache, self._next_layer = cache, 0
        past = cache.lengths
        self.num_old = len(past)
        new = [stop - start for start, stop in pairwise(borders)]
        places = [
            (row, past[row] if row < self.num_old else at)
            for row in range(len(new))
            for at in range(new[row])
        ]
        self.rows, self.positions = torch.tensor(places, device=device).T  # T, T
        if past:
            self.context = max(past) + 1
            behind = torch.arange(self.context) - torch.tensor(past)[:, None]  # R S, 0 at the new token
            self.behind = behind.to(device)[:, None, None, :]  # R 1 1 S
            self.bias = torch.where(self.behind > 0, -torch.inf, 0.0)
            if slopes is not None:
                self.bias = self.bias + slopes.float()[:, None, None] * self.behind  # R H 1 S
        self.prompts = None
        if len(new) > self.num_old:
            self.prompts = ByDocument([at - self.num_old for at in borders[self.num_old :]], slopes)
        cache.lengths = [length + 1 for length in past] + new[self.num_old :]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attend: query T H D, key and value T G D; returns T H D."""
        stored = self.cache.layer(self._next_layer, key)
        self._next_layer += 1
        for half, new in zip(stored, (key, value), strict=True):
            half[self.rows, :, self.positions] = new
        old, outputs = self.num_old, []
        if old:
            keys, values = stored[:, :old, :, : self.context]
            bias = self.bias
            if window is not None and window < self.context:
                bias = torch.where(self.behind <= -window, -torch.inf, bias)
            attended = F.scaled_dot_product_attention(
                query[:old, :, None],  # R H 1 D
                keys,  # R G S D
                values,
                attn_mask=bias.to(query.dtype),
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(attended[:, :, 0])  # R H D
        if self.prompts is not None:
            outputs.append(self.prompts(query[old:], key[old:], value[old:], scale, window))
        return torch.cat(outputs)
