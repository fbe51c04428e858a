"""Decontamination: which training texts contain a piece of an evaluation file.

    grams = EvaluationGrams.load([Path("test.jsonl")], n=20)
    grams.hit("…")    None, or 'the 20 characters in common (test.jsonl:17)'

Texts are compared as `dedup.comparable` writes them, so case, width, white space and punctuation do not count. Every
string of an evaluation record counts with all its n-grams of characters. A record that has no string that long
counts with its longest one, whole, from five characters on: a line of a poem, a short question. An n-gram of more
than eight records is not content but wording, such as a template, and is left out.

An n-gram is kept as 8 bytes: a rolling hash, looked up by numpy for all places of a text at once. A hit is checked
against nothing but the hash; two n-grams in 10¹² collide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data.dedup import comparable
from firefly.data.readers import files_of, read_records

_SHORTEST = 5  # characters of a whole string; shorter ones stand in any text
_WORDING = 8  # records
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2⁶⁴
_INVERSE = pow(_BASE, -1, 1 << 64)
_FILTER_BITS = 8  # places in the filter for each gram: a foreign gram passes one time in eight

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class EvaluationGrams:
    """The n-grams of evaluation files; pickles as its arrays."""

    lengths: tuple[int, ...]  # of the grams, in characters: n, and those of short whole strings
    hashes: Hashes  # [G] sorted
    origins: NDArray[np.int32]  # [G] the place of each gram's first record in `places`
    places: tuple[str, ...]  # "file:line"
    filter: NDArray[np.bool_]  # [2^k] which ends of hashes occur: most foreign grams are known by it alone

    @classmethod
    def load(cls, paths: Iterable[Path], n: int) -> EvaluationGrams:
        """Read files, folders or patterns of any known format; raises `InputError` as `read_records` does."""
        hashes: list[Hashes] = []
        places: list[str] = []
        lengths = {n}
        for file in (file for path in paths for file in files_of(path)):
            for line, record in read_records(file):
                texts = [comparable(text) for text in _strings(record)]
                longest = max(texts, key=len, default="")
                if len(longest) >= n:
                    grams = [_gram_hashes(_code_points(text), n) for text in texts if len(text) >= n]
                elif len(longest) >= _SHORTEST:
                    grams = [_gram_hashes(_code_points(longest), len(longest))]
                    lengths.add(len(longest))
                else:
                    continue
                hashes.append(np.unique(np.concatenate(grams)))
                places.append(f"{file.name}:{line}")
        every = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
        origins = np.repeat(np.arange(len(places), dtype=np.int32), [len(some) for some in hashes])
        found, first, num_records = np.unique(every, return_index=True, return_counts=True)
        content = num_records <= _WORDING
        found, origins = found[content], origins[first[content]]
        filter = np.zeros(1 << max(10, (len(found) * _FILTER_BITS).bit_length()), dtype=bool)
        filter[found & np.uint64(len(filter) - 1)] = True
        return cls(tuple(sorted(lengths)), found, origins, tuple(places), filter)

    def hit(self, text: str) -> str | None:
        """The first n-gram that the text shares with an evaluation record, and where that stands; None if none."""
        text = comparable(text)
        points = _code_points(text)
        for length in self.lengths:
            if len(points) < length:
                break
            hashes = _gram_hashes(points, length)
            for at in np.flatnonzero(self.filter[hashes & np.uint64(len(self.filter) - 1)]):
                found = int(np.searchsorted(self.hashes, hashes[at]))
                if found < len(self.hashes) and self.hashes[found] == hashes[at]:
                    return f"{text[at : at + length]} ({self.places[self.origins[found]]})"
        return None


def _strings(value: Any) -> Iterator[str]:
    """Every string inside a record, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _gram_hashes(points: NDArray[np.uint32], length: int) -> Hashes:
    """A hash of the characters [i, i + length) for every i: Σ mix(cⱼ)·Bʲ over the gram, divided by Bⁱ, mod 2⁶⁴."""
    num_points = len(points)
    powers, inverses = _powers(num_points)
    mixed = _mix(points.astype(np.uint64) + np.uint64(1))
    sums = np.zeros(num_points + 1, dtype=np.uint64)
    np.cumsum(mixed * powers[:num_points], out=sums[1:])
    grams = (sums[length:] - sums[:-length]) * inverses[: num_points - length + 1]
    return _mix(grams + np.uint64(length))


def _mix(values: Hashes) -> Hashes:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_known_powers: tuple[Hashes, Hashes] = (np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64))


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """At least `count` powers of the base and of its inverse; remembered, because every text needs them."""
    global _known_powers
    if len(_known_powers[0]) < count:
        size = 1 << count.bit_length()
        _known_powers = (_powers_of(_BASE, size), _powers_of(_INVERSE, size))
    return _known_powers


def _powers_of(base: int, count: int) -> Hashes:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
