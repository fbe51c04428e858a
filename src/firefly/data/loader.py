"""Batches of samples, packed: all samples of a batch lie in one row, end to end, without padding.

The order is a function of seed and position alone: sample k of the endless stream is entry k mod N of the
shuffle of epoch k div N. So a resumed run needs to know only how many samples it has seen, and packing changes
neither the order nor which samples share a batch. Yields NumPy; the model side makes tensors of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data.tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """Packed samples. T tokens, N samples, M learned tokens.

    The state at `target_positions[m]` predicts `target_ids[m]`, which belongs to sample `target_samples[m]`.
    """

    input_ids: NDArray[np.int64]  # T
    position_ids: NDArray[np.int64]  # T, from 0 in each sample
    borders: list[int]  # N + 1
    target_positions: NDArray[np.int64]  # M
    target_ids: NDArray[np.int64]  # M
    target_samples: NDArray[np.int64]  # M, 0 … N - 1
    sample_ids: list[int]  # N, numbers in the tokens directory


def pack(samples: Sequence[tuple[NDArray[Any], NDArray[Any]]], sample_ids: Sequence[int] = ()) -> Batch:
    """Lay samples, each (ids [L], mask [L]), end to end.

    A token is a target where its mask is set and it has a predecessor *in its own sample*.
    """
    lengths = np.asarray([len(ids) for ids, _ in samples], np.int64)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.concatenate([np.asarray(ids, np.int64) for ids, _ in samples])
    learned = np.concatenate([np.asarray(mask, bool) for _, mask in samples])
    learned[borders[:-1]] = False  # the first token of a sample has nothing before it
    targets = np.flatnonzero(learned)
    return Batch(
        input_ids=input_ids,
        position_ids=np.arange(len(input_ids)) - np.repeat(borders[:-1], lengths),
        borders=borders.tolist(),
        target_positions=targets - 1,
        target_ids=input_ids[targets],
        target_samples=np.repeat(np.arange(len(samples)), lengths)[targets],
        sample_ids=list(sample_ids) or list(range(len(samples))),
    )


class TrainingStream:
    """The endless, shuffled stream of training batches over `tokens`."""

    def __init__(self, tokens: Tokens, batch_size: int, seed: int, learn_everything: bool = False) -> None:
        self.tokens, self.batch_size, self.seed, self.learn_everything = (
            tokens,
            batch_size,
            seed,
            learn_everything,
        )

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted from 0 over the whole run."""
        first = number * self.batch_size
        ids = [self._sample_at(position) for position in range(first, first + self.batch_size)]
        return make_batch(self.tokens, ids, self.learn_everything)

    def _sample_at(self, position: int) -> int:
        epoch, entry = divmod(position, len(self.tokens))
        return int(_shuffle(self.seed, epoch, len(self.tokens))[entry])


@lru_cache(maxsize=2)
def _shuffle(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


def make_batch(tokens: Tokens, sample_ids: Sequence[int], learn_everything: bool = False) -> Batch:
    """Pack the given samples; `learn_everything` is the pretrain objective: loss on every token."""
    samples = [tokens.sample(number) for number in sample_ids]
    masks = [np.ones_like(sample.mask) if learn_everything else sample.mask for sample in samples]
    return pack([(sample.ids, mask) for sample, mask in zip(samples, masks, strict=True)], sample_ids)


def in_order(tokens: Tokens, max_tokens: int = 8192) -> Iterator[Batch]:
    """Every sample once, in order, in batches of at most about `max_tokens` tokens."""
    group: list[int] = []
    size = 0
    for number, length in enumerate(np.diff(tokens.borders).tolist()):
        if group and size + length > max_tokens:
            yield make_batch(tokens, group)
            group, size = [], 0
        group.append(number)
        size += length
    if group:
        yield make_batch(tokens, group)
