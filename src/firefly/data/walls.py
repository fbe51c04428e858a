"""Walls: the places in a text where no token can reach across, so that both sides are encoded as if they stood alone.

Byte-pair encoding builds no token that its vocabulary does not hold. So where no token holds the end of one
character and the beginning of the next, no merge ever crosses from the one to the other. Chinese has walls every two
or three characters. They depend on the vocabulary alone, so they hold for every text.

The pre-tokenizer must also go on behind a cut as it would have without it. Cuts therefore lie only between plain
characters, in combinations of them that the usual regular expressions treat so (`_CUTS`); that a tokenizer's does is
proved before each run (encoder.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from firefly.data.tokenizer import ModelTokenizer

_HAN, _LETTER, _DIGIT, _SPACE, _LINE, _MARK = range(1, 7)  # 0: any other character, never beside a cut
_MEMBERS = {
    _HAN: "".join(map(chr, range(0x4E00, 0x9FA6))),
    _LETTER: "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    _DIGIT: "0123456789",
    _SPACE: " ",
    _LINE: "\n",
    # without ' and /, which pre-tokenizers treat in ways of their own
    _MARK: '!"#$%&()*+,-.:;<=>?@[\\]^_`{|}~，。、；：？！…“”《》（）「」『』【】—',
}
_CUTS = {
    _HAN: (_HAN, _LETTER, _DIGIT, _MARK, _SPACE, _LINE),
    _LETTER: (_HAN, _DIGIT, _MARK, _SPACE, _LINE),
    _DIGIT: (_HAN, _LETTER, _MARK, _SPACE, _LINE),
    _MARK: (_HAN, _LETTER, _DIGIT, _SPACE),
    _LINE: (_HAN, _LETTER, _DIGIT, _MARK),
}
"""Which kind of character may stand behind a cut that follows the key's kind."""

_SPACE_SIGN = "\u2581"  # how tokenizers with byte fallback write a space
_PAIR_BITS = 22  # places in the table of joined pairs

_KINDS = np.zeros(1 << 16, np.uint8)  # of a UTF-16 unit; those of characters beyond are others
_MAY_CUT = np.zeros(64, bool)  # 8 × the kind before the cut + the kind behind it
for _kind, _members in _MEMBERS.items():
    _KINDS[[*map(ord, _members)]] = _kind
    _MAY_CUT[[8 * _kind + _next for _next in _CUTS.get(_kind, ())]] = True
_PLAIN = "".join(_MEMBERS.values())
_WIDE = np.asarray([ord(one) for one in _PLAIN if len(one.encode()) == 3], np.uint32)
_WIDE_BYTES = np.asarray([int.from_bytes(chr(one).encode()) for one in _WIDE.tolist()])  # in UTF-8, 24 bits

# How byte-level tokenizers write bytes: those that are visible in Latin-1 as that character, the others from U+0100 on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTES = {256 + number: byte for number, byte in enumerate(sorted({*range(256)} - _VISIBLE))}


class Walls:
    """The walls of one tokenizer."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        """Raises `ValueError` for a tokenizer that is not plain byte-pair encoding."""
        model = tokenizer.rust.model
        if not isinstance(model, BPE):
            raise ValueError("its model is not byte-pair encoding")
        if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
            raise ValueError("it has random merges, or marks inside words")
        normalizer, plain = tokenizer.rust.normalizer, f" {_PLAIN} "
        if normalizer is not None and normalizer.normalize_str(plain).replace(_SPACE_SIGN, " ") != plain:
            raise ValueError("it changes plain characters before it reads them")
        self._joined = _joined(tokenizer)

    def between(self, units: NDArray[np.uint16]) -> NDArray[np.bool_]:
        """Whether there is a wall between each UTF-16 unit of a text [U] and the next [U - 1]."""
        kinds = _KINDS[units]
        pairs = units[:-1] | units[1:].astype(np.uint32) << np.uint32(16)
        walls: NDArray[np.bool_] = _MAY_CUT[kinds[:-1] << 3 | kinds[1:]] & ~self._joined[_slots(pairs)]
        return walls


def _joined(tokenizer: ModelTokenizer) -> NDArray[np.bool_]:
    """For each pair of plain characters, at its place in `_slots`, whether some token may hold both or a part of both.

    Pairs share slots, so it may say yes where the answer is no: then there is a cut less, and no token is wrong.
    """
    vocabulary = tokenizer.vocabulary
    text = "\0".join(vocabulary)
    if all(symbol in vocabulary for symbol in ByteLevel.alphabet()):
        # A broken character comes out as a lone surrogate a byte.
        text = text.translate(_BYTES).encode("latin-1", "replace").decode("utf-8", "surrogateescape")
    else:
        text = text.replace(_SPACE_SIGN, " ")
    characters = np.minimum(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32), 0xFFFF)
    joined = np.zeros(1 << _PAIR_BITS, bool)
    joined[_slots(characters[:-1] | characters[1:] << np.uint32(16))] = True
    for lefts, rights in _broken_pairs(text):
        joined[_slots(lefts[:, None] | rights << np.uint32(16))] = True
    return joined


def _slots(pairs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The places of pairs of characters, the second in the higher bits, in the table of `_joined`: a hash."""
    hashes: NDArray[np.uint32] = pairs * np.uint32(2654435761) >> np.uint32(32 - _PAIR_BITS)
    return hashes


def _broken_pairs(text: str) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
    """For tokens that begin or end inside a character: what may stand on either side of a border in them."""
    for match in re.finditer("([^\0\udc80-\udcff]?)([\udc80-\udcff]+)(?=([^\0]?))", text):
        before, broken, behind = match[1], match[2].encode("utf-8", "surrogateescape"), match[3]
        for start in (place for place, byte in enumerate(broken) if byte >= 0xC0):  # a character begins here
            yield _ending(broken[:start]) if start else _alone(before), _beginning(broken[start:])
        if behind:
            yield _ending(broken), _alone(behind)


@cache
def _beginning(start: bytes) -> NDArray[np.uint32]:
    """The plain characters whose UTF-8 begins with these bytes."""
    return (
        _WIDE[_WIDE_BYTES >> 8 * (3 - len(start)) == int.from_bytes(start)] if len(start) < 3 else _WIDE[:0]
    )


@cache
def _ending(end: bytes) -> NDArray[np.uint32]:
    """The plain characters whose UTF-8 ends with these bytes."""
    return _WIDE[_WIDE_BYTES % 256 ** len(end) == int.from_bytes(end)] if len(end) < 3 else _WIDE[:0]


def _alone(character: str) -> NDArray[np.uint32]:
    return np.asarray([*map(ord, character)], np.uint32)
