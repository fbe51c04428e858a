"""Best-fit packing: samples into as few rows of `pack_length` tokens as can be found quickly.

The longest sample goes first, each into the row with the least room that still holds it (best-fit decreasing; Johnson,
1974). Rows are kept by the room that they have left, so finding one is a binary search over at most `pack_length`
numbers, and samples of one length are placed together. On lengths like the article's, over 99 % of the slots of rows
of 2,048 are real tokens. How many rows there are depends on the lengths alone, not on the order of the samples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from firefly.errors import InputError


@dataclass(frozen=True)
class Rows:
    """R rows of N samples: row i holds `samples[borders[i] : borders[i + 1]]`."""

    samples: NDArray[np.int64]  # N
    borders: NDArray[np.int64]  # R + 1
    tokens: int
    pack_length: int

    def __len__(self) -> int:
        return len(self.borders) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """The samples of a row."""
        return self.samples[self.borders[number] : self.borders[number + 1]]

    @property
    def efficiency(self) -> float:
        """Share of the rows' slots that hold real tokens."""
        return self.tokens / max(1, len(self) * self.pack_length)


def pack_rows(lengths: NDArray[np.int64], pack_length: int, seed: tuple[int, ...] = ()) -> Rows:
    """Pack samples of the given lengths [N]; `seed` decides which of several samples of a length goes where.

    Raises `InputError` when a sample is longer than `pack_length`.
    """
    if len(lengths) and lengths.max() > pack_length:
        raise InputError(
            f"data.pack_length = {pack_length} and the longest sample has {lengths.max()} tokens; raise pack_length, "
            "or lower data.max_seq_length."
        )
    order = np.random.default_rng(seed).permutation(len(lengths)) if seed else np.arange(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    values, counts = np.unique(lengths, return_counts=True)
    row_of = np.empty(len(lengths), np.int64)
    room: dict[int, list[int]] = {}  # tokens left → rows
    sizes: list[int] = []  # the keys of `room`, in order
    num_rows = done = 0

    def put_back(rows: list[int], left: int) -> None:
        if rows and left:
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left] += rows

    # All samples of a length at once: a row once begun takes as many of them as it can, for it has the least room.
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = done + count
        while done < end:
            found = bisect_left(sizes, length)
            size = sizes[found] if found < len(sizes) else pack_length
            each = size // length
            needed = -(-(end - done) // each)
            if found == len(sizes):
                rows = list(range(num_rows, num_rows + needed))
                num_rows += needed
            else:
                rows = room[size][: -needed - 1 : -1]
                del room[size][-needed:]
                if not room[size]:
                    del room[size], sizes[found]
            taken = min(end - done, each * len(rows))
            row_of[done : done + taken] = np.repeat(rows, each)[:taken]
            full, rest = divmod(taken, each)
            put_back(rows[:full], size - each * length)
            put_back(rows[full:], size - rest * length)
            done += taken
    by_row = np.argsort(row_of, kind="stable")
    borders = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))]).astype(np.int64)
    return Rows(order[by_row], borders, int(lengths.sum()), pack_length)
