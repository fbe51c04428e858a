"""Sequences end to end behave as the lists that they stand for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.sequences import EncodedTexts, borders, spans

LISTS = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=8)


@given(LISTS, st.data())
def test_taking_and_replacing(each: list[list[int]], data: st.DataObject) -> None:
    encoded = EncodedTexts.of(each)
    assert encoded.lists() == each and encoded.lengths.tolist() == [len(one) for one in each]
    numbers = data.draw(st.lists(st.integers(0, len(each) - 1), max_size=9)) if each else []
    assert encoded.take(np.asarray(numbers, np.int64)).lists() == [each[number] for number in numbers]
    where = data.draw(st.lists(st.booleans(), min_size=len(each), max_size=len(each)))
    others = [[number] * number for number in range(sum(where))]
    waiting = iter(others)
    expected = [next(waiting) if one else ids for one, ids in zip(where, each, strict=True)]
    assert encoded.replaced(np.asarray(where, bool), EncodedTexts.of(others)).lists() == expected


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_spans_and_borders(each: list[tuple[int, int]]) -> None:
    starts, lengths = np.asarray(each, np.int64).reshape(-1, 2).T
    assert spans(starts, lengths).tolist() == [
        start + step for start, length in each for step in range(length)
    ]
    assert borders(lengths).tolist() == [
        sum(length for _, length in each[:end]) for end in range(len(each) + 1)
    ]
