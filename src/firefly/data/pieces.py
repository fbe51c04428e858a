"""Encoding by pieces: text is cut where no token can reach across, and each distinct piece is encoded once.

Byte-pair encoding builds no token that its vocabulary does not hold. So where no token holds the end of one
character and the beginning of the next, no merge ever crosses from the one to the other, and both sides come out as
if they stood alone: a *wall*. Chinese has walls every two or three characters, and the pieces between them are words
and phrases, which come again and again: a table of the pieces met so far answers for most of them, all at once in
NumPy, and the tokenizer encodes the rest. Walls depend on the vocabulary alone, so they hold for every text.

A piece has one place in the table, by its hash, and a new one takes the place of the old: the table never grows. It
keeps whole pieces, not hashes, so a piece is never taken for another.

The pre-tokenizer must also go on behind a cut as it would have without it. Cuts therefore lie only between plain
characters, in combinations of them that the usual regular expressions treat so (`_CUTS`); that a tokenizer's does is
proved before each run (encoder.py). A text with an added token's name is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from firefly.data.tokenizer import EncodedTexts, ModelTokenizer

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
_MEMORY_BITS = 20  # places in the table of pieces: 64 MiB
_UNITS, _IDS = 15, 7  # a piece in the table has at most so many UTF-16 units and ids
_WORDS = 4  # of 64 bits, for a piece's units and their number; as many for its ids and their number

# By a piece's length: which bits of the four words that begin at its first unit are its own.
_OWN = np.asarray(
    [
        [(1 << 16 * min(max(length - 4 * word, 0), 4)) - 1 for word in range(_WORDS)]
        for length in [*range(_UNITS + 1), _UNITS]
    ],
    np.uint64,
)
_FACTORS = np.asarray(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)

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


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Texts in UTF-16, cut. U units, P pieces, N texts."""

    whole: str
    words: NDArray[np.uint64]  # U + 13: four units, from each one on
    cuts: NDArray[np.int64]  # P + 1: piece i is units cuts[i] : cuts[i + 1]
    borders: NDArray[np.int64]  # N + 1: text i is pieces borders[i] : borders[i + 1]

    def strings(self, numbers: NDArray[np.int64]) -> list[str]:
        """The pieces of these numbers."""
        spans = zip(self.cuts[numbers].tolist(), self.cuts[numbers + 1].tolist(), strict=True)
        if len(self.words) == len(self.whole) + _UNITS - 2:
            return [self.whole[start:end] for start, end in spans]
        data = self.whole.encode("utf-16-le", "surrogatepass")  # some characters take two units
        return [data[2 * start : 2 * end].decode("utf-16-le", "surrogatepass") for start, end in spans]

    def keys(self) -> NDArray[np.uint64]:
        """What tells each piece of up to 15 units from any other [P, 4]: the units, and at the end how many."""
        starts, lengths = self.cuts[:-1], np.minimum(np.diff(self.cuts), _UNITS + 1)
        keys = _OWN[lengths]
        for word in range(_WORDS):
            keys[:, word] &= self.words[starts + 4 * word]
        keys[:, -1] |= lengths.astype(np.uint64) << np.uint64(48)
        return keys


class PieceEncoder:
    """Gives the tokenizer's ids for many texts, and asks it only for pieces that it does not remember."""

    def __init__(
        self, tokenizer: ModelTokenizer, encode_new: Callable[[list[str]], EncodedTexts] | None = None
    ):
        """`encode_new` encodes new pieces as the tokenizer would, which else does it itself.

        Raises `ValueError` for a tokenizer that is not plain byte-pair encoding.
        """
        model = tokenizer.rust.model
        if not isinstance(model, BPE):
            raise ValueError("its model is not byte-pair encoding")
        if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
            raise ValueError("it has random merges, or marks inside words")
        normalizer, plain = tokenizer.rust.normalizer, f" {_PLAIN} "
        if normalizer is not None and normalizer.normalize_str(plain).replace(_SPACE_SIGN, " ") != plain:
            raise ValueError("it changes plain characters before it reads them")
        self.tokenizer, self._encode_new = tokenizer, encode_new or tokenizer.encode_texts
        self._joined = _joined(tokenizer)
        names = list(filter(None, tokenizer.added_tokens()))
        self._openers = {name[0] for name in names}
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._memory = np.zeros((1 << _MEMORY_BITS, 2 * _WORDS), np.uint64)  # key; ids and their number

    def encode_many(self, texts: list[str]) -> EncodedTexts:
        """The ids of each text, as `ModelTokenizer.encode_texts` gives them."""
        pieces = self._cut(texts)
        encoded, doubtful = self._look_up(pieces)
        encoded = EncodedTexts(encoded.ids, encoded.borders[pieces.borders])
        whole = self._with_names(texts)
        whole[np.searchsorted(pieces.borders, doubtful, side="right") - 1] = True
        if whole.any():
            uncut = self.tokenizer.encode_texts([text for text, one in zip(texts, whole, strict=True) if one])
            encoded = encoded.replaced(whole, uncut)
        return encoded

    def pieces(self, texts: list[str]) -> list[str]:
        """All texts cut at walls."""
        pieces = self._cut(texts)
        return pieces.strings(np.arange(len(pieces.cuts) - 1))

    def _with_names(self, texts: list[str]) -> NDArray[np.bool_]:
        """Which texts [N] hold an added token's name."""

        def holds_name(text: str) -> bool:
            return any(map(text.__contains__, self._openers)) and self._names.search(text) is not None

        if holds_name("".join(texts)):
            return np.asarray([*map(holds_name, texts)], bool)
        return np.zeros(len(texts), bool)

    def _cut(self, texts: list[str]) -> _Pieces:
        whole = "".join(texts)
        data = whole.encode("utf-16-le", "surrogatepass")
        num_units = len(data) // 2
        if num_units == len(whole):
            lengths = [*map(len, texts)]
        else:
            lengths = [len(text.encode("utf-16-le", "surrogatepass")) // 2 for text in texts]
        padded = data + bytes(2 * (_UNITS + 1))
        words = np.ndarray(num_units + _UNITS - 2, "<u8", padded, strides=(2,)).copy()
        kinds = _KINDS[np.frombuffer(data, "<u2")]
        is_cut = np.zeros(num_units + 1, bool)
        is_cut[1:-1] = _MAY_CUT[kinds[:-1] << 3 | kinds[1:]]
        is_cut[1:-1] &= ~self._joined[_slots(words[: len(kinds[1:])].astype(np.uint32))]
        ends = np.cumsum([0, *lengths])
        is_cut[ends] = True
        cuts = np.flatnonzero(is_cut)
        return _Pieces(whole, words, cuts, np.searchsorted(cuts, ends))

    def _look_up(self, pieces: _Pieces) -> tuple[EncodedTexts, NDArray[np.int64]]:
        """The ids of each piece, and the numbers of those that may be encoded otherwise in a longer text."""
        keys = pieces.keys()
        places = (keys @ _FACTORS) >> np.uint64(64 - _MEMORY_BITS)
        rows = self._memory[places]
        found = rows[:, _WORDS:].view(np.uint32)  # ids, and their number
        known = (rows[:, :_WORDS] == keys).all(axis=1)
        counts = np.where(known, found[:, -1], 0)
        ids = found[:, :_IDS][np.arange(_IDS) < counts[:, None]]
        encoded = EncodedTexts(ids, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))
        missing = np.flatnonzero(~known)
        if not len(missing):
            return encoded, missing
        numbers: dict[str, int] = {}
        which = np.asarray([numbers.setdefault(piece, len(numbers)) for piece in pieces.strings(missing)])
        new = self._encode_new([*numbers])
        doubtful = self._doubtful([*numbers], new)
        first = missing[np.unique(which, return_index=True)[1]]
        fits = (np.diff(pieces.cuts)[first] <= _UNITS) & (new.lengths <= _IDS) & ~doubtful
        self._remember(places[first[fits]], keys[first[fits]], new.take(np.flatnonzero(fits)))
        return encoded.replaced(~known, new.take(which)), missing[doubtful[which]]

    def _remember(self, places: NDArray[np.uint64], keys: NDArray[np.uint64], encoded: EncodedTexts) -> None:
        values = np.zeros((len(keys), _IDS + 1), np.uint32)
        values[:, -1] = encoded.lengths
        values[:, :_IDS][np.arange(_IDS) < values[:, -1:]] = encoded.ids
        self._memory[places] = np.concatenate([keys, values.view(np.uint64)], axis=1)

    def _doubtful(self, pieces: list[str], encoded: EncodedTexts) -> NDArray[np.bool_]:
        """Which pieces are a token that no merge builds, which comes only where it is a whole word."""
        model = self.tokenizer.rust.model
        if not model.ignore_merges:
            return np.zeros(len(pieces), bool)
        model.ignore_merges = False
        try:
            merged = self.tokenizer.encode_texts(pieces)
        finally:
            model.ignore_merges = True
        return np.asarray(
            [alone != inside for alone, inside in zip(encoded.lists(), merged.lists(), strict=True)]
        )


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
