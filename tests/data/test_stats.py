"""Summaries of lengths are exact, from a list or from counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.stats import PERCENTILES, length_summary


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=200))
def test_a_summary_is_what_numpy_says(lengths: list[int]) -> None:
    summary = length_summary(lengths)
    assert summary == length_summary(Counter(lengths))
    for share in PERCENTILES:
        assert abs(summary[f"p{share}"] - np.percentile(lengths, share)) < 0.06
    assert (summary["min"], summary["max"], summary["count"]) == (min(lengths), max(lengths), len(lengths))
    assert summary["total"] == sum(lengths) and abs(summary["mean"] - np.mean(lengths)) < 0.006


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=300))
def test_the_histogram_holds_all_but_the_longest(lengths: list[int]) -> None:
    summary = length_summary(lengths)
    width, counts = summary["histogram"]["width"], summary["histogram"]["counts"]
    for number, count in enumerate(counts):
        assert count == sum(number * width <= length < (number + 1) * width for length in lengths)
    beyond = len(lengths) - sum(counts)
    assert beyond <= 1 + len(lengths) // 50 and len(counts) < 200


def test_no_lengths() -> None:
    assert length_summary([]) == length_summary(Counter()) == {"count": 0}
