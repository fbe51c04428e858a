"""Many sequences end to end in one array, with the borders between them: taken and replaced without a loop."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """The ids of N texts end to end: those of text i are `ids[borders[i] : borders[i + 1]]`. T tokens in all."""

    ids: NDArray[np.uint32]  # T
    borders: NDArray[np.int64]  # N + 1

    @classmethod
    def of(cls, each: Iterable[list[int]]) -> EncodedTexts:
        """The ids of one text after the other."""
        ids, borders = array("I"), [0]
        for one in each:
            ids.fromlist(one)
            borders.append(len(ids))
        return cls(np.asarray(ids, np.uint32), np.asarray(borders, np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each text has [N]."""
        return np.diff(self.borders)

    def lists(self) -> list[list[int]]:
        """The ids of each text."""
        return [self.ids[start:end].tolist() for start, end in pairwise(self.borders.tolist())]

    def take(self, numbers: NDArray[np.int64]) -> EncodedTexts:
        """The texts of these numbers, in this order."""
        lengths = self.lengths[numbers]
        return EncodedTexts(self.ids[spans(self.borders[numbers], lengths)], borders(lengths))

    def replaced(self, where: NDArray[np.bool_], others: EncodedTexts) -> EncodedTexts:
        """The same with the texts at `where` [N] taken from `others`, in order."""
        ends = np.concatenate([self.borders, self.borders[-1] + others.borders[1:]])
        numbers = np.arange(len(where))
        numbers[where] = len(where) + np.arange(len(others.borders) - 1)
        return EncodedTexts(np.concatenate([self.ids, others.ids]), ends).take(numbers)


def borders(lengths: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    """Where sequences of these lengths [N] begin, laid end to end, and where the last one ends [N + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def spans(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places start, start + 1, … start + length − 1 of each span, one span after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(lengths.sum())
