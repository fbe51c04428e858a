"""Packing keeps every sample, whole and once, and leaves almost no slot empty."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.pack import pack_rows
from firefly.errors import InputError


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100), st.integers(0, 3))
def test_no_sample_is_lost_doubled_or_split(lengths: list[int], pack_length: int, seed: int) -> None:
    rows = pack_rows(np.asarray(lengths, np.int64), pack_length, (seed,))
    assert sorted(rows.samples.tolist()) == list(range(len(lengths)))
    for number in range(len(rows)):
        row = rows.row(number).tolist()
        assert row and sum(lengths[sample] for sample in row) <= pack_length
    assert rows.tokens == sum(lengths)
    assert len(rows) == len(pack_rows(np.asarray(lengths, np.int64), pack_length))  # whatever the seed
    if lengths:  # best fit opens a row only when no other has room, so all but one are more than half full
        fills = sorted(sum(lengths[sample] for sample in rows.row(number)) for number in range(len(rows)))
        assert all(first + second > pack_length for first, second in pairwise(fills))


def one_by_one(lengths: list[int], pack_length: int) -> list[int]:
    """The row of each sample when the longest goes first, each into the row begun last of those with least room."""
    rooms: list[tuple[int, int]] = []  # left, row
    rows = [0] * len(lengths)
    num_rows = 0
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        fits = [place for place, (left, _) in enumerate(rooms) if left >= lengths[sample]]
        if fits:
            least = min(rooms[place][0] for place in fits)
            left, row = rooms.pop(max(place for place in fits if rooms[place][0] == least))
        else:
            left, row = pack_length, num_rows
            num_rows += 1
        rows[sample] = row
        rooms.append((left - lengths[sample], row))
    return rows


@given(st.lists(st.integers(1, 12), max_size=80), st.integers(12, 40))
def test_it_is_best_fit_one_sample_after_the_other(lengths: list[int], pack_length: int) -> None:
    packed = pack_rows(np.asarray(lengths, np.int64), pack_length)
    found = {sample: number for number in range(len(packed)) for sample in packed.row(number).tolist()}
    assert [found[sample] for sample in range(len(lengths))] == one_by_one(lengths, pack_length)


def test_the_articles_lengths_fill_the_rows() -> None:
    """Lognormal with a median of 90 and a tail to 1,000: at least 99 % of the slots of 2,048 are real tokens."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(90), 0.9, 50_000).astype(np.int64), 8, 1000)
    assert pack_rows(lengths, 2048, (1,)).efficiency >= 0.99


def test_the_seed_decides_which_samples_share_a_row() -> None:
    lengths = np.full(100, 10, np.int64)
    first, again, other = (pack_rows(lengths, 40, (seed, 0)).samples.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.pack_length = 8 and the longest sample has 9 tokens"):
        pack_rows(np.asarray([3, 9], np.int64), 8)
