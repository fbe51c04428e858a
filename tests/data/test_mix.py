"""Mixing: caps keep exactly as many, weights and temperature move shares, and nothing depends on the order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.mix import copies, multiplicities, within_cap

CHANCES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60, unique=True)


@given(CHANCES, st.integers(0, 70))
def test_a_cap_keeps_the_same_records_in_any_order(values: list[int], cap: int) -> None:
    chance = np.array(values, np.uint64)
    alive = np.arange(len(values)) % 4 != 0
    kept = within_cap(chance, alive, cap)
    assert kept.sum() == min(cap, alive.sum()) and not (kept & ~alive).any()
    order = np.random.default_rng(len(values)).permutation(len(values))
    again = within_cap(chance[order], alive[order], cap)
    assert set(chance[kept].tolist()) == set(chance[order][again].tolist())


@given(CHANCES)
def test_a_smaller_cap_keeps_some_of_the_larger_ones(values: list[int]) -> None:
    chance, alive = np.array(values, np.uint64), np.ones(len(values), bool)
    small, large = (within_cap(chance, alive, cap) for cap in (len(values) // 3, len(values) // 2))
    assert not (small & ~large).any()


def test_weights_epochs_and_temperature() -> None:
    counts = {"Couplet": 10_000, "Program": 100}
    even = {"Couplet": 1.0, "Program": 1.0}
    assert multiplicities(counts, even, 1, 1) == {"Couplet": 1, "Program": 1}
    assert multiplicities(counts, even, 3, 1) == {"Couplet": 3, "Program": 3}
    assert multiplicities(counts, {"Couplet": 0.5, "Program": 2}, 1, 1) == {"Couplet": 0.5, "Program": 2}
    flat = multiplicities(counts, even, 1, 2)
    assert flat["Couplet"] * 10_000 + flat["Program"] * 100 == pytest.approx(10_100)  # the total stays
    assert flat["Couplet"] * 10_000 / (flat["Program"] * 100) == pytest.approx(10)  # the root of 100
    assert multiplicities({"Couplet": 0}, even, 1, 1) == {"Couplet": 0}
    assert multiplicities(counts, {"Couplet": 0, "Program": 1}, 1, 2) == {"Couplet": 0, "Program": 1}


@given(st.floats(0, 5))
def test_copies_are_as_many_as_asked_on_average(multiplicity: float) -> None:
    chance = np.random.default_rng(0).integers(0, 2**64, 4000, np.uint64, endpoint=False)
    found = copies(chance, multiplicity)
    assert set(found.tolist()) <= {int(multiplicity), int(multiplicity) + 1}
    assert found.mean() == pytest.approx(multiplicity, abs=0.04)
    assert (copies(chance, multiplicity + 0.3) >= found).all()
