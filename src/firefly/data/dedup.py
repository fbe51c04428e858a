"""Deduplication of corpora larger than memory: the same text, and nearly the same text.

    text ──content_key──▶ 16 bytes ──mark_exact──▶ duplicate_of    equal after normalising
    text ──signature──▶ P minima ──band_keys──▶ B keys ──mark_near──▶ duplicate_of

The workers make keys and signatures; the marking reads them from memory-mapped arrays, one part of the key space at
a time, so memory holds one part and some bytes a record. Of several copies the best stays: the one with the longest
answer (`quality_of`), then the earliest. A near copy is dropped only when it is near a record that stays, never
through a chain of others: a ~ b ~ c with a unlike c drops b alone when a is best. The result depends on the records
alone, not on the parts and (but for ties) not on their order.

Near means: an estimated Jaccard similarity of the sets of character 5-grams of at least the threshold. MinHash
(Broder 1997) estimates it by the share of equal minima; its standard error is √(J(1−J)/P), 0.035 at J = 0.8.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# N records, P permutations, B bands
PERMUTATIONS = 128
SHINGLE = 5  # characters
_SEED = 20230401
_LONGEST_COUNTED = 4096
_RECALL = 0.95  # at the threshold itself; well above it, a pair shares a band almost surely
_PAIRS_AT_ONCE = 1 << 14
_PART_RECORDS = 1 << 20
_NOT_WORD = re.compile(r"[\W_]+")
_UNDECIDED, _KEPT, _DROPPED = 0, 1, 2


@functools.lru_cache(maxsize=8)  # the same text is asked for its key, its signature and its overlap in turn
def comparable(text: str) -> str:
    """The text as its copies share it: NFKC, lower case, without white space and punctuation.

    A text of nothing else stays as it is.
    """
    return _NOT_WORD.sub("", unicodedata.normalize("NFKC", text).lower()) or text


def content_key(text: str) -> bytes:
    """A 16-byte hash of `comparable(text)`."""
    return hashlib.blake2b(comparable(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def signature(text: str) -> NDArray[np.uint32]:
    """The MinHash signature [P] of the character 5-grams of `comparable(text)`; a shorter text is one gram."""
    from rensa import RMinHash

    text = comparable(text)
    hashes = RMinHash(num_perm=PERMUTATIONS, seed=_SEED)
    hashes.update([text[at : at + SHINGLE] for at in range(max(1, len(text) - SHINGLE + 1))])
    return np.array(hashes.digest(), dtype=np.uint32)


def quality_of(target: str) -> int:
    """How good a copy is: the length of its answer, up to 4,096 characters; beyond, longer is no better."""
    return min(len(target), _LONGEST_COUNTED)


def band_keys(signature: NDArray[np.uint32], threshold: float) -> NDArray[np.uint64]:
    """The keys [B] under which a signature [P] is looked up (or [N, B] for [N, P]): one a band of rows.

    Records that share no key are never compared. B follows from the threshold: as many rows a band as still let
    95 % of the pairs exactly at the threshold share a key.
    """
    rows = _rows_per_band(threshold)
    num_bands = signature.shape[-1] // rows
    bands = signature[..., : num_bands * rows].reshape(*signature.shape[:-1], num_bands, rows)
    keys = np.zeros(bands.shape[:-1], dtype=np.uint64)
    for row in range(rows):  # a multiply-xorshift hash; chance collisions only cost a comparison
        keys = (keys ^ bands[..., row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _rows_per_band(threshold: float) -> int:
    def recall(rows: int) -> float:
        return float(1 - (1 - threshold**rows) ** (PERMUTATIONS // rows))

    return max((rows for rows in range(1, PERMUTATIONS + 1) if recall(rows) >= _RECALL), default=1)


def mark_exact(
    keys: Array, quality: Array, out: Array | None = None, part_records: int = _PART_RECORDS
) -> Array:
    """For each record the record that it repeats, or −1 where it stays.

    Args:
        keys: 16-byte keys [N], of any dtype that lies in memory as N × 16 bytes.
        quality: [N] uint32; the highest stays, then the earliest.
        out: [N] int64 to write to, such as a memory map; made when None.
        part_records: about how many records are sorted at once.
    """
    halves = keys.view("<u8").reshape(len(quality), 2)
    duplicate_of = np.empty(len(quality), dtype=np.int64) if out is None else out
    duplicate_of[:] = -1
    for members in _parts(halves[:, 0], part_records):
        first, second = halves[members, 0], halves[members, 1]
        order = np.lexsort((members, ~quality[members], second, first))
        first, second, members = first[order], second[order], members[order]
        starts = np.flatnonzero(_changes(first) | _changes(second))
        best = np.repeat(members[starts], np.diff(starts, append=len(members)))
        duplicate_of[members] = np.where(best == members, -1, best)
    return duplicate_of


def mark_near(
    bands: Array,
    signatures: Array,
    quality: Array,
    threshold: float,
    out: Array | None = None,
    part_records: int = _PART_RECORDS,
) -> Array:
    """For each record a kept record that it nearly repeats, or −1 where it stays.

    Going from the best record to the worst, a record is kept unless it is near a kept one. That choice is made in
    rounds, each a pass over the bands: a record is dropped when a kept one is near it, and kept when after a whole
    pass no better record near it is left undecided.

    Args:
        bands: `band_keys` [N, B] uint64; records without a key in common are never compared. Read column by
            column, so a memory map is best laid out as the transpose of [B, N].
        signatures: [N, P] uint32.
        quality: [N] uint32; the highest stays, then the earliest.
        threshold: the share of a signature that two records must have in common to be near.
        out: [N] int64 to write to; where it is not −1 already (from `mark_exact`), the record takes no part.
        part_records: about how many records are compared at once.
    """
    duplicate_of = np.full(len(quality), -1, dtype=np.int64) if out is None else out
    copies = np.flatnonzero(duplicate_of[:] >= 0)
    state = np.full(len(quality), _UNDECIDED, dtype=np.uint8)
    state[copies] = _DROPPED
    while (state == _UNDECIDED).any():
        blocked = np.zeros(len(quality), dtype=bool)
        for band in range(bands.shape[1]):
            keys = bands[:, band]
            open_keys = np.unique(keys[state == _UNDECIDED]) if (state == _KEPT).any() else None
            for members in _parts(keys, part_records, state, open_keys):
                found = _members_by_bucket(keys[members], members, quality)
                _decide_part(*found, signatures, threshold, state, blocked, duplicate_of)
        state[(state == _UNDECIDED) & ~blocked] = _KEPT
    # A copy of a record that went in turn is near to whatever that one is near to.
    onward = duplicate_of[duplicate_of[copies]]
    duplicate_of[copies] = np.where(onward >= 0, onward, duplicate_of[copies])
    return duplicate_of


def _decide_part(
    members: Array,
    starts: Array,
    signatures: Array,
    threshold: float,
    state: Array,
    blocked: Array,
    duplicate_of: Array,
) -> None:
    """Compare each undecided record with the better ones of its bucket, until it is found near one.

    Near a kept record it is dropped; near an undecided one it is blocked, for this round.
    """
    positions = np.flatnonzero((state[members] == _UNDECIDED) & (starts < np.arange(len(members))))
    rank = 0  # in the bucket, from the best: all buckets advance together
    while len(positions):
        better, worse = members[starts[positions] + rank], members[positions]
        compare = state[better] != _DROPPED
        near = np.zeros(len(positions), dtype=bool)
        near[compare] = _are_near(signatures, better[compare], worse[compare], threshold)
        dropped = near & (state[better] == _KEPT)
        duplicate_of[worse[dropped]] = better[dropped]
        state[worse[dropped]] = _DROPPED
        blocked[worse[near & ~dropped]] = True
        rank += 1
        positions = positions[~near & (starts[positions] + rank < positions)]


def _are_near(signatures: Array, left: Array, right: Array, threshold: float) -> NDArray[np.bool_]:
    """Whether pairs of records agree in at least `threshold` of their signatures."""
    needed = threshold * signatures.shape[1] - 1e-9
    near = np.zeros(len(left), dtype=bool)
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        near[some] = (signatures[left[some]] == signatures[right[some]]).sum(axis=1) >= needed
    return near


def _members_by_bucket(keys: Array, members: Array, quality: Array) -> tuple[Array, Array]:
    """Records of one key side by side, the best first, and for each where its key begins; lone ones left out."""
    order = np.lexsort((members, ~quality[members], keys))
    keys, members = keys[order], members[order]
    starts = np.flatnonzero(_changes(keys))
    sizes = np.diff(starts, append=len(keys))
    shared = np.repeat(sizes > 1, sizes)
    members, sizes = members[shared], sizes[sizes > 1]
    return members, np.repeat(np.cumsum(sizes) - sizes, sizes)


def _changes(values: Array) -> NDArray[np.bool_]:
    """Where a sorted array takes a new value, the first place included."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return new


def _parts(
    keys: Array, part_records: int, state: Array | None = None, open_keys: Array | None = None
) -> Iterator[Array]:
    """The records of one range of keys after the other; without dropped ones, and only with a key in `open_keys`.

    Every record of a key is in the same part, so what is done key by key does not depend on the parts.
    """
    num_parts = 1 << max(0, (len(keys) - 1) // part_records).bit_length()
    for part in range(num_parts):
        found = []
        for start in range(0, len(keys), _PART_RECORDS):
            some = keys[start : start + _PART_RECORDS]
            here = (some >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32) == part
            if state is not None:
                here &= state[start : start + _PART_RECORDS] != _DROPPED
            if open_keys is not None:
                here[here] = _is_in(some[here], open_keys)
            found.append(np.flatnonzero(here) + start)
        yield np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _is_in(values: Array, sorted_set: Array) -> NDArray[np.bool_]:
    at = np.searchsorted(sorted_set, values)
    at[at == len(sorted_set)] = 0
    return np.asarray(sorted_set[at] == values) if len(sorted_set) else np.zeros(len(values), dtype=bool)
