"""Deduplication: agrees with brute force, does not depend on parts or order, and forgets what it has seen."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from firefly.data.dedup import (
    PERMUTATIONS,
    SHINGLE,
    band_keys,
    comparable,
    content_key,
    mark_exact,
    mark_near,
    quality_of,
    signature,
)

THRESHOLD = 0.8


def some_text(seed: int, length: int = 120) -> str:
    draw = random.Random(seed)
    return "".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(length))


def edited(text: str, seed: int, edits: int) -> str:
    draw = random.Random(seed)
    characters = list(text)
    for _ in range(edits):
        characters[draw.randrange(len(characters))] = chr(0x4E00 + draw.randrange(3000))
    return "".join(characters)


def jaccard(left: str, right: str) -> float:
    one, other = ({t[at : at + SHINGLE] for at in range(len(t) - SHINGLE + 1)} for t in (left, right))
    return len(one & other) / len(one | other)


def keys_of(texts: list[str]) -> NDArray[Any]:
    return np.frombuffer(b"".join(map(content_key, texts)), dtype="V16")


def corpus(num_families: int, seed: int) -> list[str]:
    """Families of near copies of all degrees, shuffled."""
    draw = random.Random(seed)
    texts = []
    for family in range(num_families):
        text = some_text(seed * 10_000 + family, draw.randrange(40, 160))
        texts += [text] + [
            edited(text, draw.random(), draw.randrange(0, 9)) for _ in range(draw.randrange(5))
        ]
    draw.shuffle(texts)
    return texts


def arrays(texts: list[str], seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    signatures = np.stack([signature(text) for text in texts])
    grades = np.random.default_rng(seed).permutation(len(texts)).astype(np.uint32)
    return band_keys(signatures, THRESHOLD), signatures, grades


def greedy(bands: NDArray[Any], signatures: NDArray[Any], grades: NDArray[Any], threshold: float) -> set[int]:
    """The definition: from the best to the worst, keep what is not near a kept one."""
    kept: list[int] = []
    for record in sorted(range(len(grades)), key=lambda index: (-int(grades[index]), index)):
        if not any(
            (bands[record] == bands[other]).any()
            and (signatures[record] == signatures[other]).mean() >= threshold - 1e-12
            for other in kept
        ):
            kept.append(record)
    return set(kept)


def test_the_same_text_has_the_same_key_however_it_is_set() -> None:
    same = ["你好，World！１２", "你好 world 12", "你好\nＷＯＲＬＤ。12"]
    assert len({content_key(text) for text in same}) == 1
    assert len({content_key(text) for text in ["你好", "您好", "？", "！", "", "\ud800"]}) == 6
    assert len(content_key("")) == 16
    assert (signature(same[0]) == signature(same[1])).all()


def test_keys_and_signatures_never_change() -> None:
    """The same recipe gives the same dataset everywhere: a library that hashes otherwise shows here."""
    assert content_key("流萤").hex() == "85b249e7fca2472d96462cdfd1a624c3"
    assert signature("白日依山尽，黄河入海流。")[:3].tolist() == [3430418357, 3241408908, 3277353185]
    assert band_keys(signature("白日依山尽，黄河入海流。"), 0.8)[:2].tolist() == [
        8150673326077227664,
        14055389477288284328,
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["甲", "乙", "丙", "丁 ", "甲！"]), st.integers(0, 3)), max_size=30),
    st.integers(1, 7),
)
def test_of_exact_copies_the_best_stays_then_the_earliest(
    records: list[tuple[str, int]], part_records: int
) -> None:
    keys = keys_of([text for text, _ in records])
    grades = np.array([grade for _, grade in records], dtype=np.uint32)
    found = mark_exact(keys, grades, part_records=part_records)
    best: dict[str, int] = {}
    for index, (text, grade) in enumerate(records):
        name = comparable(text)
        if name not in best or grade > records[best[name]][1]:
            best[name] = index
    expected = [-1 if best[comparable(t)] == i else best[comparable(t)] for i, (t, _) in enumerate(records)]
    assert found.tolist() == expected


def test_near_copies_agree_with_exact_jaccard_within_minhash_error() -> None:
    texts = corpus(90, seed=1)
    bands, signatures, _ = arrays(texts, seed=1)
    error, num_near, missed = [], 0, 0
    for left in range(len(texts)):
        for right in range(left):
            true = jaccard(texts[left], texts[right])
            estimate = (signatures[left] == signatures[right]).mean()
            if true > 0.3:
                error.append(estimate - true)
            else:
                assert estimate < 0.55
            if true >= 0.85:
                num_near += 1
                missed += not (bands[left] == bands[right]).any()
    assert len(error) > 150 and num_near > 30
    assert abs(np.mean(error)) < 0.02 and np.std(error) < 1.5 * 0.5 / np.sqrt(PERMUTATIONS)
    assert missed <= 0.05 * num_near


@pytest.mark.parametrize("part_records", [1, 37, 1 << 20])
def test_near_copies_are_those_of_the_definition(part_records: int) -> None:
    texts = corpus(120, seed=2)
    bands, signatures, grades = arrays(texts, seed=2)
    found = mark_near(bands, signatures, grades, THRESHOLD, part_records=part_records)
    assert set(np.flatnonzero(found < 0)) == greedy(bands, signatures, grades, THRESHOLD)
    dropped = np.flatnonzero(found >= 0)
    assert len(dropped) > 30
    for record in dropped:
        keeper = found[record]
        assert found[keeper] == -1 and grades[keeper] > grades[record]
        assert (signatures[keeper] == signatures[record]).mean() >= THRESHOLD
        assert jaccard(texts[record], texts[keeper]) > THRESHOLD - 4 * 0.036
    assert found.tolist() == mark_near(bands, signatures, grades, THRESHOLD).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 25), st.integers(1, 4), st.integers(1, 5))
def test_any_web_of_near_records_is_decided_as_defined(
    seed: int, num_records: int, num_values: int, part_records: int
) -> None:
    """Random short signatures: long chains, cycles, ties and shared bands in plenty."""
    draw = np.random.default_rng(seed)
    signatures = draw.integers(0, num_values + 1, (num_records, 6)).astype(np.uint32)
    bands = signatures[:, ::2].astype(np.uint64) << np.uint64(40)
    grades = draw.integers(0, 3, num_records).astype(np.uint32)
    found = mark_near(bands, signatures, grades, 0.5, part_records=part_records)
    assert set(np.flatnonzero(found < 0)) == greedy(bands, signatures, grades, 0.5)


def test_a_longer_answer_is_better_up_to_a_point() -> None:
    assert [quality_of("字" * length) for length in (0, 5, 4096, 9000)] == [0, 5, 4096, 4096]


def test_the_order_of_records_does_not_matter() -> None:
    texts = corpus(60, seed=3)
    bands, signatures, grades = arrays(texts, seed=3)
    found = mark_near(bands, signatures, grades, THRESHOLD)
    order = np.random.default_rng(4).permutation(len(texts))
    again = mark_near(bands[order], signatures[order], grades[order], THRESHOLD)
    assert {texts[index] for index in np.flatnonzero(found < 0)} == {
        texts[order[index]] for index in np.flatnonzero(again < 0)
    }


def test_a_chain_drops_its_middle_alone() -> None:
    first = some_text(5, 400)
    middle = edited(first, 6, 4)
    last = edited(middle, 7, 4)
    texts = [first, middle, last]
    bands, signatures, _ = arrays(texts, 0)
    near = [(signatures[a] == signatures[b]).mean() for a, b in ((0, 1), (1, 2), (0, 2))]
    threshold = (min(near[:2]) + near[2]) / 2
    assert near[2] < threshold < min(near[:2])
    bands = np.zeros((3, 1), dtype=np.uint64)
    assert mark_near(bands, signatures, np.array([3, 2, 1], np.uint32), threshold).tolist() == [-1, 0, -1]
    assert mark_near(bands, signatures, np.array([1, 3, 2], np.uint32), threshold).tolist() == [1, -1, 1]


def test_exact_copies_take_no_part_and_follow_their_original() -> None:
    text = some_text(8, 300)
    better, other = edited(text, 9, 2), some_text(10)
    texts = [text, text + "。", better, other]
    grades = np.array([1, 1, 5, 1], np.uint32)
    found = mark_exact(keys_of(texts), grades)
    assert found.tolist() == [-1, 0, -1, -1]
    signatures = np.stack([signature(text) for text in texts])
    mark_near(band_keys(signatures, THRESHOLD), signatures, grades, THRESHOLD, out=found)
    assert found.tolist() == [2, 2, -1, -1]


def test_nothing_at_all() -> None:
    none = np.empty(0, dtype=np.uint32)
    assert mark_exact(np.empty(0, "V16"), none).tolist() == []
    empty = np.empty((0, 18), np.uint64)
    assert mark_near(empty, np.empty((0, PERMUTATIONS), np.uint32), none, THRESHOLD).tolist() == []


def test_memory_maps_stay_on_the_disk(tmp_path: Path) -> None:
    """Twice the records cost a few bytes more each, not another signature."""

    def peak(num_records: int) -> int:
        folder = tmp_path / str(num_records)
        folder.mkdir()

        def on_disk(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
            return np.memmap(folder / name, dtype, "w+", shape=shape)

        signatures = on_disk("signatures", "u4", (num_records, PERMUTATIONS))
        bands = on_disk("bands", "u8", (num_records, 18))
        keys, grades = on_disk("keys", "V16", (num_records,)), on_disk("grades", "u4", (num_records,))
        out = on_disk("out", "i8", (num_records,))
        draw = np.random.default_rng(0)
        for start in range(0, num_records, 1000):
            some = draw.integers(0, 2**32, (1000, PERMUTATIONS), dtype=np.uint32)
            some[500:] = some[:500]
            signatures[start : start + 1000] = some
            bands[start : start + 1000] = band_keys(some, THRESHOLD)
            keys[start : start + 1000] = np.frombuffer(draw.bytes(16_000), "V16")
        tracemalloc.start()
        mark_exact(keys, grades, out=out, part_records=2000)
        mark_near(bands, signatures, grades, THRESHOLD, out=out, part_records=2000)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (out >= 0).sum() == num_records // 2
        return used

    small, large = peak(10_000), peak(20_000)
    assert large - small < 10_000 * 64 < 10_000 * 4 * PERMUTATIONS
