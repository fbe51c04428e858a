"""Encoding by pieces: text is cut where no token can reach across, and each distinct piece is encoded once.

Byte-pair encoding builds no token that its vocabulary does not hold. So where no token holds the end of one
character and the beginning of the next, no merge ever crosses from the one to the other, and both sides come out as
if they stood alone: a *wall*. Chinese has walls every two or three characters, and the pieces between them are words
and phrases, which come again and again: a dictionary answers for most of them, and the tokenizer itself encodes the
rest. Walls depend on the vocabulary alone, so they hold for every text.

The pre-tokenizer must also go on behind a cut as it would have without it. Cuts therefore lie only between plain
characters, in combinations of them that the usual regular expressions treat so (`_CUTS`); that a tokenizer's does is
proved before each run (encoder.py). A text with an added token's name is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

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
_TABLE_BITS = 22
_KNOWN_CHARACTERS = 1 << 20  # in the dictionary of pieces; with their ids about 60 MB

_KINDS = np.zeros(1 << 16, np.uint8)  # of a character by its code point; beyond these all are others
_MAY_CUT = np.zeros((len(_MEMBERS) + 1, len(_MEMBERS) + 1), bool)
for _kind, _members in _MEMBERS.items():
    _KINDS[[*map(ord, _members)]] = _kind
    _MAY_CUT[_kind, list(_CUTS.get(_kind, ()))] = True
_PLAIN = "".join(_MEMBERS.values())
_WIDE = np.asarray([ord(one) for one in _PLAIN if len(one.encode()) == 3], np.uint32)
_WIDE_BYTES = np.frombuffer("".join(map(chr, _WIDE)).encode(), np.uint8).reshape(-1, 3)

# How byte-level tokenizers write bytes: those that are visible in Latin-1 as that character, the others from U+0100 on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTES = {256 + number: byte for number, byte in enumerate(sorted({*range(256)} - _VISIBLE))}


class PieceEncoder:
    """Gives the tokenizer's ids for many texts, and asks it only for pieces that it has not met yet."""

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
        self.tokenizer = tokenizer
        self._joined = _joined(tokenizer)
        names = list(filter(None, tokenizer.added_tokens()))
        self._openers = {name[0] for name in names}
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._known: dict[str, bytes] = {}
        self._known_characters = 0
        self._doubtful: set[str] = (
            set()
        )  # known pieces that stand for themselves otherwise than in a longer text

    def encode_many(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, as `ModelTokenizer.encode_packed` gives them."""
        kept_whole = [self._holds_name(text) for text in texts]
        if not any(kept_whole):
            return self._encode(texts)
        pairs = list(zip(texts, kept_whole, strict=True))
        uncut = iter(self.tokenizer.encode_packed([text for text, whole in pairs if whole]))
        cut = iter(self._encode([text for text, whole in pairs if not whole]))
        return [next(uncut if whole else cut) for whole in kept_whole]

    def _holds_name(self, text: str) -> bool:
        return any(map(text.__contains__, self._openers)) and self._names.search(text) is not None

    def _encode(self, texts: list[str]) -> list[bytes]:
        pieces, borders = self.pieces(texts)
        found = self._look_up(pieces)
        encoded = [b"".join(found[start:end]) for start, end in pairwise(borders)]
        if self._doubtful:
            for number, (start, end) in enumerate(pairwise(borders)):
                if not self._doubtful.isdisjoint(pieces[start:end]):
                    (encoded[number],) = self.tokenizer.encode_packed([texts[number]])
        return encoded

    def pieces(self, texts: list[str]) -> tuple[list[str], list[int]]:
        """All texts cut at walls; those of text i are pieces[borders[i] : borders[i + 1]]."""
        whole = "".join(texts)
        characters = np.minimum(np.frombuffer(whole.encode("utf-32-le", "surrogatepass"), np.uint32), 0xFFFF)
        kinds = _KINDS[characters]
        ends = np.cumsum([0, *map(len, texts)])
        is_cut = np.zeros(len(whole) + 1, bool)
        is_cut[1:-1] = _MAY_CUT[kinds[:-1], kinds[1:]]
        is_cut[1:-1] &= ~self._joined[_slot(characters[:-1], characters[1:])]
        is_cut[ends] = True
        cuts = np.flatnonzero(is_cut)
        pieces = [whole[start:end] for start, end in pairwise(cuts.tolist())]
        return pieces, np.searchsorted(cuts, ends).tolist()

    def _look_up(self, pieces: list[str]) -> list[bytes]:
        """The ids of each piece; new ones are encoded and remembered."""
        found = list(map(self._known.get, pieces))
        missing = [number for number, ids in enumerate(found) if ids is None]
        if missing:
            if self._known_characters > _KNOWN_CHARACTERS:
                self._known.clear()
                self._doubtful.clear()
                self._known_characters = 0
            new = list({pieces[number]: None for number in missing})
            self._known.update(zip(new, self._encode_new(new), strict=True))
            self._known_characters += sum(map(len, new))
            for number in missing:
                found[number] = self._known[pieces[number]]
        return found  # type: ignore[return-value]

    def _encode_new(self, pieces: list[str]) -> list[bytes]:
        encoded = self.tokenizer.encode_packed(pieces)
        model = self.tokenizer.rust.model
        if model.ignore_merges:  # some tokens come only where they are a whole word, not by merges
            model.ignore_merges = False
            try:
                merged = self.tokenizer.encode_packed(pieces)
            finally:
                model.ignore_merges = True
            triples = zip(pieces, encoded, merged, strict=True)
            self._doubtful.update(piece for piece, alone, inside in triples if alone != inside)
        return encoded


def _joined(tokenizer: ModelTokenizer) -> NDArray[np.bool_]:
    """For each pair of plain characters, at its `_slot`, whether some token may hold both or a part of both.

    Pairs share slots, so it may say yes where the answer is no: then there is a cut less, and no token is wrong.
    """
    vocabulary = tokenizer.rust.get_vocab(with_added_tokens=False)
    text = "\0".join(vocabulary)
    if all(symbol in vocabulary for symbol in ByteLevel.alphabet()):
        # A broken character comes out as a lone surrogate a byte.
        text = text.translate(_BYTES).encode("latin-1", "replace").decode("utf-8", "surrogateescape")
    else:
        text = text.replace(_SPACE_SIGN, " ")
    characters = np.minimum(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32), 0xFFFF)
    joined = np.zeros(1 << _TABLE_BITS, bool)
    joined[_slot(characters[:-1], characters[1:])] = True
    for lefts, rights in _broken_pairs(text):
        joined[_slot(lefts[:, None], rights)] = True
    return joined


def _slot(lefts: NDArray[np.uint32], rights: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The place of pairs of characters in the table of `_joined`: a multiplicative hash."""
    mixed = (lefts * np.uint32(65599) + rights) * np.uint32(2654435761)
    return mixed >> np.uint32(32 - _TABLE_BITS)


def _broken_pairs(text: str) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
    """For tokens that begin or end inside a character: what may stand on either side of a border in them."""
    for match in re.finditer("([^\0\udc80-\udcff]?)([\udc80-\udcff]+)(?=([^\0]?))", text):
        before, broken, behind = match[1], match[2].encode("utf-8", "surrogateescape"), match[3]
        for start in (place for place, byte in enumerate(broken) if byte >= 0xC0):  # a character begins here
            lefts = _ending(broken[:start]) if start else _alone(before)
            yield lefts, _WIDE[(_WIDE_BYTES[:, : len(broken) - start] == [*broken[start:]]).all(axis=1)]
        if behind:
            yield _ending(broken), _alone(behind)


def _ending(end: bytes) -> NDArray[np.uint32]:
    """The plain characters whose UTF-8 ends with these bytes."""
    return _WIDE[(_WIDE_BYTES[:, -len(end) :] == [*end]).all(axis=1)] if len(end) < 3 else _WIDE[:0]


def _alone(character: str) -> NDArray[np.uint32]:
    return np.asarray([*map(ord, character)], np.uint32)
