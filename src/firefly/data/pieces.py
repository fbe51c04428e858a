"""Encoding by pieces: text is cut where no token can reach across, and each piece is looked up before it is encoded.

The pieces between walls (walls.py) are words and phrases, which come again and again: a table of those met so far
answers for most of them, all at once in NumPy, and the tokenizer encodes the rest. A piece has one place in the table,
by its hash, and a new one takes the place of the old: the table never grows. It keeps whole pieces, not hashes, so a
piece is never taken for another. A text with an added token's name is encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from firefly.data.sequences import EncodedTexts, borders
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.walls import Walls

_MEMORY_BITS = 19  # places in the table of pieces: 32 MiB
_UNITS, _IDS = 15, 7  # a piece in the table has at most so many UTF-16 units and ids
_WORDS = 4  # of 64 bits, for a piece's units and their number; as many for its ids and their number
_AHEAD = 13  # the four words of a piece at the very end begin 0, 4, 8 and 12 units behind its first

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


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Texts in UTF-16, cut. U units, P pieces, N texts."""

    whole: str
    words: NDArray[np.uint64]  # U + 13: the four units from each on
    cuts: NDArray[np.int64]  # P + 1: piece i is units cuts[i] : cuts[i + 1]
    borders: NDArray[np.int64]  # N + 1: text i is pieces borders[i] : borders[i + 1]

    def strings(self, numbers: NDArray[np.int64]) -> list[str]:
        """The pieces of these numbers."""
        spans = zip(self.cuts[numbers].tolist(), self.cuts[numbers + 1].tolist(), strict=True)
        if len(self.words) == len(self.whole) + _AHEAD:
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
        self.tokenizer, self._encode_new = tokenizer, encode_new or tokenizer.encode_texts
        self._walls = Walls(tokenizer)
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
        padded = data + bytes(8 * _WORDS)
        words = np.ndarray(num_units + _AHEAD, "<u8", padded, strides=(2,)).copy()  # they overlap
        is_cut = np.ones(num_units + 1, bool)
        is_cut[1:-1] = self._walls.between(np.frombuffer(data, "<u2"))
        ends = borders(lengths)
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
        encoded = EncodedTexts(ids, borders(counts))
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
