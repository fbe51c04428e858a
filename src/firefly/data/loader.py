"""Batches of samples, packed: all samples of a batch lie end to end, without padding.

    stream = TrainingStream(tokens, batch_size, seed)                     # a batch counts samples
    stream = TrainingStream(tokens, batch_size, seed, pack_length=2048)   # a batch counts rows of best-fit samples
    stream.batch(n)                                                       # any batch, at once

In a tokens directory of pairs a sample means a pair's chosen answer alone, or with `pairs` both answers, chosen first.

The order is a function of seed and position alone: unit k (a sample or a row) of the endless stream is entry k mod N
of the shuffle of epoch k div N; rows are packed anew each epoch. So a resumed run needs to know only how many batches
it has seen, and `world_size` ranks take their shares of the same global batches. Yields NumPy; the model side makes
tensors of it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data.pack import Rows, pack_rows
from firefly.data.tokens import Tokens
from firefly.errors import InputError


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
    """The endless, shuffled stream of one rank's training batches over `tokens`.

    Global batch n is units n · B … (n + 1) · B - 1 for B = batch_size · world_size; rank r takes the r-th share.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        seed: int,
        learn_everything: bool = False,
        pack_length: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        pairs: bool = False,
    ) -> None:
        """Raises `InputError` when a sample is longer than `pack_length`, or there are no `pairs`."""
        assert 0 <= rank < world_size
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.learn_everything, self.pack_length = learn_everything, pack_length
        self.rank, self.world_size = rank, world_size
        self._samples = _samples(tokens, pairs)
        self._epoch: tuple[int, NDArray[np.int64], Rows | None] = (-1, np.zeros(0, np.int64), None)
        rows = self._units(0)[1]
        self.num_units = len(self._samples) if rows is None else len(rows)
        self.efficiency = 1.0 if rows is None else rows.efficiency

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted from 0 over the whole run."""
        return make_batch(self.tokens, self.sample_ids(number), self.learn_everything)

    def sample_ids(self, number: int) -> list[int]:
        """The samples of batch `number`."""
        first = (number * self.world_size + self.rank) * self.batch_size
        return [one for place in range(first, first + self.batch_size) for one in self._samples_at(place)]

    def samples_until(self, number: int) -> set[int]:
        """The samples of all ranks' batches before `number`."""
        places = range(number * self.world_size * self.batch_size)
        return {one for place in places for one in self._samples_at(place)}

    def batch_tokens(self, count: int) -> NDArray[np.int64]:
        """Tokens in each of the first `count` batches, without making them.

        Where batches count rows, those of later epochs are as full as the first one's and are left out.
        """
        lengths = np.diff(self.tokens.borders)[self._samples].sum(axis=1)
        if self.pack_length is not None:
            count = min(count, -(-self.num_units // (self.batch_size * self.world_size)))
        num_units = count * self.world_size * self.batch_size
        sizes: list[NDArray[np.int64]] = []
        for epoch in range(-(-num_units // self.num_units)):
            order, rows = self._units(epoch)
            units = lengths if rows is None else np.add.reduceat(lengths[rows.samples], rows.borders[:-1])
            sizes.append(units[order])
        shares = np.concatenate(sizes)[:num_units].reshape(count, self.world_size, self.batch_size)
        return shares[:, self.rank].sum(1)  # type: ignore[no-any-return]

    def _samples_at(self, position: int) -> list[int]:
        epoch, entry = divmod(position, self.num_units)
        order, rows = self._units(epoch)
        unit = int(order[entry])
        units = [unit] if rows is None else rows.row(unit)
        return [int(one) for one in self._samples[units].ravel()]

    def _units(self, epoch: int) -> tuple[NDArray[np.int64], Rows | None]:
        """The order of an epoch's units, and what the rows hold where units are rows."""
        if self._epoch[0] != epoch:
            rows = None
            if self.pack_length is not None:
                lengths = np.diff(self.tokens.borders)[self._samples].sum(axis=1)
                rows = pack_rows(lengths, self.pack_length, (self.seed, epoch, 1))
            order = np.random.default_rng([self.seed, epoch]).permutation(
                len(self._samples) if rows is None else len(rows)
            )
            self._epoch = (epoch, order, rows)
        return self._epoch[1:]


def _samples(tokens: Tokens, pairs: bool) -> NDArray[np.int64]:
    """Numbers of the samples that go together: one a row [N, 1], or with `pairs` chosen and rejected [N, 2]."""
    if pairs and not tokens.pairs:
        raise InputError(
            "train.objective = 'dpo' learns from preferences (records with 'chosen' and 'rejected'), and the dataset "
            "has none; name such sources in data.sources, or choose another objective."
        )
    numbers = np.arange(len(tokens)).reshape(-1, 2 if tokens.pairs else 1)
    return numbers if pairs else numbers[:, :1]


def make_batch(tokens: Tokens, sample_ids: Sequence[int], learn_everything: bool = False) -> Batch:
    """Pack the given samples; `learn_everything` is the pretrain objective: loss on every token."""
    samples = [tokens.sample(number) for number in sample_ids]
    masks = [np.ones_like(sample.mask) if learn_everything else sample.mask for sample in samples]
    return pack([(sample.ids, mask) for sample, mask in zip(samples, masks, strict=True)], sample_ids)


def in_order(
    tokens: Tokens, max_tokens: int = 8192, pairs: bool = False, among: Container[int] | None = None
) -> Iterator[Batch]:
    """Every sample once (or those `among` some), in order, in batches of at most about `max_tokens` tokens."""
    group: list[int] = []
    size = 0
    samples = _samples(tokens, pairs)
    lengths = np.diff(tokens.borders)[samples].sum(axis=1)
    for numbers, length in zip(samples.tolist(), lengths.tolist(), strict=True):
        if among is not None and numbers[0] not in among:
            continue
        if group and size + length > max_tokens:
            yield make_batch(tokens, group)
            group, size = [], 0
        group += numbers
        size += length
    if group:
        yield make_batch(tokens, group)
