"""Decontamination: which training texts contain a piece of an evaluation file.

    grams = EvaluationGrams.load([Path("test.jsonl")], n=20)
    grams.hit("…")    None, or 'the 20 characters in common (test.jsonl:17)'

Texts are compared as `dedup.comparable` writes them, so case, width, white space and punctuation do not count. Every
string of an evaluation record counts with all its n-grams of characters. A record that has no string that long
counts with its longest one, whole, from five characters on: a line of a poem, a short question. An n-gram of more
than eight records is not content but wording, such as a template, and is left out.

An n-gram is kept as 8 bytes: a rolling hash, looked up by numpy for all places of a text at once. By chance, one
foreign n-gram in 10¹² is taken for one of ten million.
"""

from __future__ import annotations

from collections import defaultdict
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
_FILTER_PLACES = 8  # for each gram: a foreign gram passes one time in eight or sixteen

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class _Table:
    """A set of n-grams of one length, by hash."""

    length: int  # in characters
    hashes: Hashes  # [G] sorted
    filter: NDArray[np.bool_]  # [2^k] which ends of hashes occur: most foreign grams are known by it alone

    @classmethod
    def of(cls, length: int, hashes: Hashes) -> _Table:
        """The table of sorted hashes."""
        filter = np.zeros(1 << max(10, (len(hashes) * _FILTER_PLACES).bit_length()), dtype=bool)
        filter[hashes & np.uint64(len(filter) - 1)] = True
        return cls(length, hashes, filter)

    def find(self, sums: Hashes) -> Iterator[tuple[int, int]]:
        """Each place of a text (its `_sums`) where an n-gram of the set begins, and the gram's index."""
        hashes = _gram_hashes(sums, self.length)
        for at in self.filter[hashes & np.uint64(len(self.filter) - 1)].nonzero()[0]:
            found = int(np.searchsorted(self.hashes, hashes[at]))
            if found < len(self.hashes) and self.hashes[found] == hashes[at]:
                yield int(at), found


@dataclass(frozen=True)
class EvaluationGrams:
    """The n-grams of evaluation files; pickles as its arrays."""

    places: tuple[str, ...]  # "file:line" of each record
    grams: _Table
    origins: NDArray[np.int32]  # [G] the first record of each gram, in `places`
    wholes: dict[str, list[tuple[str, str]]]  # short texts and their places, by their first five characters
    beginnings: _Table  # those first five characters

    @classmethod
    def load(cls, paths: Iterable[Path], n: int) -> EvaluationGrams:
        """Read files, folders or patterns of any known format; raises `InputError` as `read_records` does."""
        hashes: list[Hashes] = [np.empty(0, dtype=np.uint64)]
        records: list[int] = [0]  # whose hashes they are
        places: list[str] = []
        short: defaultdict[str, list[str]] = defaultdict(list)
        for file in (file for path in paths for file in files_of(path)):
            for line, record in read_records(file):
                texts = [comparable(text) for text in _strings(record)]
                longest = max(texts, key=len, default="")
                if len(longest) >= n:
                    grams = [_gram_hashes(_sums(text), n) for text in texts if len(text) >= n]
                    hashes.append(np.unique(np.concatenate(grams)))
                    records.append(len(places))
                elif len(longest) >= _SHORTEST:
                    short[longest].append(f"{file.name}:{line}")
                places.append(f"{file.name}:{line}")
        origins = np.repeat(np.array(records, dtype=np.int32), [len(some) for some in hashes])
        found, first, num_records = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
        content = num_records <= _WORDING
        wholes: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for text, where in short.items():
            if len(where) <= _WORDING:
                wholes[text[:_SHORTEST]].append((text, where[0]))
        beginnings = [_gram_hashes(_sums(text), _SHORTEST) for text in wholes]
        return cls(
            tuple(places),
            _Table.of(n, found[content]),
            origins[first[content]],
            dict(wholes),
            _Table.of(_SHORTEST, np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *beginnings]))),
        )

    def hit(self, text: str) -> str | None:
        """The first n-gram that the text shares with an evaluation record, and where that stands; None if none."""
        text = comparable(text)
        sums = _sums(text)
        for at, gram in self.grams.find(sums):
            return f"{text[at : at + self.grams.length]} ({self.places[self.origins[gram]]})"
        if self.wholes:
            for at, _ in self.beginnings.find(sums):
                for whole, place in self.wholes.get(text[at : at + _SHORTEST], ()):
                    if text.startswith(whole, at):
                        return f"{whole} ({place})"
        return None


def _strings(value: Any) -> Iterator[str]:
    """Every string inside a record, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _sums(text: str) -> Hashes:
    """Of each beginning of the text, the empty one first, Σ mix(cⱼ)·Bʲ mod 2⁶⁴."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sums = np.zeros(len(points) + 1, dtype=np.uint64)
    np.cumsum(_MIX[points & 0x1FFFF] * _powers(len(points))[0][: len(points)], out=sums[1:])
    return sums


def _gram_hashes(sums: Hashes, length: int) -> Hashes:
    """The hash of the characters [i, i + length) for every i: Σ mix(cᵢ₊ⱼ)·Bʲ; none where the text is shorter."""
    num_grams = max(0, len(sums) - length)
    return (sums[length:] - sums[:num_grams]) * _powers(num_grams)[1][:num_grams]


def _mixed(values: Hashes) -> Hashes:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_MIX = _mixed(np.arange(1, 1 + (1 << 17), dtype=np.uint64))  # by the lower 17 bits of a character's code


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
