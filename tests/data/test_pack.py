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
